"""Text from a model: sampling, and prefill with KV-cached decoding."""
