"""Attention with grouped queries, sliding windows, segment ids and soft caps."""
