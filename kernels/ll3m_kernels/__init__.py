"""Fused operations for transformers in JAX; importable by any JAX project.

Dimensions: B batch, T query length, S key length, D model, N query heads, K KV heads,
G = N / K, H head dim, V vocabulary.
"""

from ll3m_kernels.attention.api import flash_attention
from ll3m_kernels.attention.block_sizes import BlockSizes
from ll3m_kernels.attention.vjp import ATTENTION_RESIDUALS
from ll3m_kernels.cross_entropy.api import linear_cross_entropy
from ll3m_kernels.dispatch import target
from ll3m_kernels.explanation import explain
from ll3m_kernels.norms.api import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from ll3m_kernels.rotary.api import rotary_embedding
from ll3m_kernels.sharding import Sharding

__all__ = [
  "ATTENTION_RESIDUALS",
  "BlockSizes",
  "Sharding",
  "add_layer_norm",
  "add_rms_norm",
  "explain",
  "flash_attention",
  "layer_norm",
  "linear_cross_entropy",
  "rms_norm",
  "rotary_embedding",
  "target",
]
