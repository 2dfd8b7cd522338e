"""Attention with grouped queries, windows, segments and soft caps."""
