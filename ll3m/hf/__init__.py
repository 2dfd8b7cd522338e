"""Hugging Face checkpoints, read and written without torch."""
