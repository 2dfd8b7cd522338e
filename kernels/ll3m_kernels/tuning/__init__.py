"""Finds block sizes by the TPU compiler's estimates, and keeps them in tables."""
