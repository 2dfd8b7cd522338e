"""The decoder in Haiku: one implementation, configured by `ModelConfig`."""
