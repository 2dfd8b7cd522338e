"""LL3M: convert, train, evaluate, generate with and export open language models in JAX."""
