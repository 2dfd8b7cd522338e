"""Rotary position embeddings: a TPU kernel, plain jnp, and the exact angles that both use."""
