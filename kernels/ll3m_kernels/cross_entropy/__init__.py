"""Softmax cross-entropy of a linear head whose logits are never in memory as a whole."""
