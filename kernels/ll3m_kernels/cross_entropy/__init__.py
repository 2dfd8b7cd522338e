"""Softmax cross-entropy of a linear head, without ever materialising all logits."""
