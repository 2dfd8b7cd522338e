"""Self-attention: projections and rotary embedding around an attention function.

Dimensions: B batch, T length, D model, N query heads, K KV heads, H head dim.
"""

from collections.abc import Callable
from typing import Any

import haiku as hk
from jaxtyping import Array, Float, Int

from ll3m.core.model_config import LayerKind, ModelConfig
from ll3m.models.kernels import Kernels
from ll3m.models.layers import Linear, Norm, projections, residual_stddev
from ll3m.models.rope import rotate
from ll3m_kernels import flash_attention

# (query [B,T,N,H], key [B,T,K,H], value [B,T,K,H]) -> (attended [B,T,N,H], aux), where aux is any
# per-layer output for the caller, e.g. the key-value cache.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Attention(hk.Module):
  """Self-attention: projections to queries, keys and values, rotation, attention, projection."""

  def __init__(
    self,
    config: ModelConfig,
    kind: LayerKind,
    *,
    fused: bool,
    kernels: Kernels,
    is_long: bool | None = None,
    name: str = "attention",
  ):
    """Creates the module.

    Args:
      config: The architecture.
      kind: What the layer differs in from others.
      fused: Whether the query, key and value projections are one matrix.
      kernels: The kernels' implementation and sharding.
      is_long: Whether texts are long; see `models.rope.rotate`.
      name: The name of the module.
    """
    super().__init__(name=name)
    self._config = config
    self._kind = kind
    self._fused = fused
    self._kernels = kernels
    self._is_long = is_long

  def __call__(
    self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend
  ) -> tuple[Float[Array, "B T D"], Any]:
    """Returns the output before the residual addition, and the second output of `attend`."""
    config = self._config
    batch, length, d_model = x.shape
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    query, key, value = projections(
      x.reshape(-1, d_model),
      ("query", "key", "value"),
      tuple(n * config.head_dim for n in heads),
      use_bias=config.use_bias or config.qkv_bias,
      fused=self._fused,
    )  # [B * T, N * H], [B * T, K * H] twice
    query_norm, key_norm = (
      Norm(config, kernels=self._kernels, name=f"{name}_norm") for name in ("query", "key")
    )
    if config.qk_norm == "all_heads":
      query, key = query_norm(query), key_norm(key)
    query, key, value = (
      y.reshape(batch, length, n, config.head_dim)
      for n, y in zip(heads, (query, key, value), strict=True)
    )
    if config.qk_norm == "per_head":
      query, key = query_norm(query), key_norm(key)
    query, key = rotate(
      config, self._kind.rope, query, key, positions, kernels=self._kernels, is_long=self._is_long
    )
    attended, kept = attend(query, key, value)  # [B, T, N, H]
    out = Linear(d_model, use_bias=config.use_bias, stddev=residual_stddev(config), name="out")
    return out(attended.reshape(batch * length, -1)).reshape(x.shape), kept


def causal_attention(
  config: ModelConfig,
  kind: LayerKind,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segment_ids: Int[Array, "B T"] | None,
  kernels: Kernels,
) -> Float[Array, "B T N H"]:
  """Returns causal attention within the layer's window and the segment."""
  return flash_attention(
    query,
    key,
    value,
    is_causal=True,
    # A window of w keys includes the query's own: w - 1 keys to its left.
    local_window_size=None if kind.window is None else (kind.window - 1, 0),
    segment_ids=segment_ids,
    **score_options(config),
    **kernels.options,
  )


def score_options(config: ModelConfig) -> dict[str, Any]:
  """Returns the arguments of `flash_attention` that scale and cap the scores."""
  scalar = config.query_pre_attn_scalar
  return {
    "scale": None if scalar is None else scalar**-0.5,
    "logits_soft_cap": config.attention_soft_cap,
  }
