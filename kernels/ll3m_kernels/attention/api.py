"""The public attention function: checks its arguments and chooses an implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.attention import xla


def flash_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  scale: float | None = None,
  is_causal: bool = False,
  local_window_size: int | tuple[int, int] | None = None,
  segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  logits_soft_cap: float | None = None,
  return_residual: bool = False,
  block_sizes: Any = None,
  implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Computes softmax(scale * Q K^T + mask) V with grouped queries (Dao, 2023).

  Names and meanings are those of `jax.nn.dot_product_attention` where it has them. Query head n
  reads KV head n // (N / K). A query that sees no key gives 0, and no gradient.

  Args:
    query: the queries.
    key: the keys.
    value: the values; their head dim may differ from the keys'.
    scale: multiplies the scores; H**-0.5 by default.
    is_causal: query t sees keys s <= t, also for T != S (aligned at the top left).
    local_window_size: (left, right), or one number for both: query t sees the keys
      t - left <= s <= t + right.
    segment_ids: a query sees only keys of its own segment. One array for self-attention, or
      (query's, key's). Compared for equality only; no id is special.
    logits_soft_cap: scores become cap * tanh(scores / cap).
    return_residual: also return the log-sum-exp of each query's scores, float32.
    block_sizes: of a tiled implementation; None lets it choose.
    implementation: see `dispatch.resolve`.

  Returns:
    The attended values, in the query's dtype; softmax runs in float32.

  Raises:
    ValueError: shapes, dtypes or options that do not fit.
    NotImplementedError: the named implementation cannot serve an argument.
  """
  _check(query, key, value)
  window = _window(local_window_size)
  query_ids, key_ids = _segments(segment_ids, query, key)
  dispatch.resolve(implementation)
  if block_sizes is not None:
    raise NotImplementedError("block_sizes: implementation 'xla' has no blocks")
  output, log_sum_exp = xla.attention(
    query,
    key,
    value,
    scale=query.shape[-1] ** -0.5 if scale is None else scale,
    is_causal=is_causal,
    window=window,
    query_ids=query_ids,
    key_ids=key_ids,
    logits_soft_cap=logits_soft_cap,
  )
  return (output, log_sum_exp) if return_residual else output


def _check(query: Array, key: Array, value: Array) -> None:
  for name, array in (("query", query), ("key", key), ("value", value)):
    if array.ndim != 4:
      raise ValueError(f"{name} must be [batch, length, heads, head dim], got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating, got {array.dtype}")
  if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
    raise ValueError(
      f"query, key and value must agree in batch, and key and value in length and heads, got "
      f"{query.shape}, {key.shape} and {value.shape}"
    )
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(
      f"query and key must have one head dim, got {query.shape[-1]} and {key.shape[-1]}"
    )
  if query.shape[2] % key.shape[2]:
    raise ValueError(
      f"query heads ({query.shape[2]}) must be a multiple of KV heads ({key.shape[2]})"
    )


def _window(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
  if size is None:
    return None
  left, right = (size, size) if isinstance(size, int) else size
  if left < 0 or right < 0:
    raise ValueError(f"local_window_size must not be negative, got {size}")
  return left, right


def _segments(
  segment_ids: Any, query: Array, key: Array
) -> tuple[Array, Array] | tuple[None, None]:
  if segment_ids is None:
    return None, None
  query_ids, key_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
  for name, ids, like in (("query", query_ids, query), ("key", key_ids, key)):
    if ids.shape != like.shape[:2]:
      raise ValueError(f"segment ids of the {name} must be {like.shape[:2]}, got {ids.shape}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f"segment ids must be integers, got {ids.dtype}")
  return query_ids, key_ids
