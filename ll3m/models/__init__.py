"""The decoder in Haiku: one implementation, whose switches are `ModelConfig`'s."""
