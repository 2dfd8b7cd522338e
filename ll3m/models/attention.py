"""Self-attention: projections and rotary embedding around an attention function.

Dimensions: B batch, T length, D model, N query heads, K KV heads, H head dim.
"""

from collections.abc import Callable
from typing import Any

import haiku as hk
from jaxtyping import Array, Float, Int

from ll3m.core.model_config import ModelConfig
from ll3m.models.kernels import Kernels
from ll3m.models.layers import Linear, projections, residual_stddev
from ll3m_kernels import flash_attention, rotary_embedding

# (query [B,T,N,H], key [B,T,K,H], value [B,T,K,H]) -> (attended [B,T,N,H], aux), where aux is any
# per-layer output for the caller, e.g. the key-value cache.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Attention(hk.Module):
  """Self-attention: projections to queries, keys and values, rotation, attention, projection."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    fused: bool,
    kernels: Kernels,
    name: str = "attention",
  ):
    """Creates the module.

    Args:
      config: The architecture.
      fused: Whether the query, key and value projections are one matrix.
      kernels: The kernels' implementation and sharding.
      name: The name of the module.
    """
    super().__init__(name=name)
    self._config = config
    self._fused = fused
    self._kernels = kernels

  def __call__(
    self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend
  ) -> tuple[Float[Array, "B T D"], Any]:
    """Returns the output before the residual addition, and the second output of `attend`."""
    config = self._config
    batch, length, d_model = x.shape
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    query, key, value = (
      y.reshape(batch, length, n, config.head_dim)
      for n, y in zip(
        heads,
        projections(
          x.reshape(-1, d_model),
          ("query", "key", "value"),
          tuple(n * config.head_dim for n in heads),
          use_bias=config.use_bias,
          fused=self._fused,
        ),
        strict=True,
      )
    )
    query, key = rotary_embedding(
      query,
      key,
      positions,
      theta=config.rope_theta,
      scaling_factor=config.rope_scaling_factor,
      rotary_dim=config.rotary_dim,
      **self._kernels.options,
    )
    attended, kept = attend(query, key, value)  # [B, T, N, H]
    out = Linear(d_model, use_bias=config.use_bias, stddev=residual_stddev(config), name="out")
    return out(attended.reshape(batch * length, -1)).reshape(x.shape), kept


def causal_attention(
  config: ModelConfig,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segment_ids: Int[Array, "B T"] | None,
  kernels: Kernels,
) -> Float[Array, "B T N H"]:
  """Returns causal attention within the sliding window and the segment."""
  window = config.sliding_window
  return flash_attention(
    query,
    key,
    value,
    is_causal=True,
    # A window of w keys includes the query's own: w - 1 keys to its left.
    local_window_size=None if window is None else (window - 1, 0),
    segment_ids=segment_ids,
    **kernels.options,
  )
