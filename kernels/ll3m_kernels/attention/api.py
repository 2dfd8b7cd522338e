"""The public attention function: checks its arguments and chooses an implementation."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.attention import decoding
from ll3m_kernels.attention.blocks import (
  BlockSizes,
  backward_bytes,
  choose_blocks,
  forward_bytes,
  problem_of,
)
from ll3m_kernels.attention.operation import Static, attention
from ll3m_kernels.attention.spec import Spec, make_span
from ll3m_kernels.sharding import Sharding, vary_alike

MAX_HEAD_DIM = 256


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
  block_sizes: BlockSizes | None = None,
  implementation: str | None = None,
  sharding: Sharding | None = None,
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
    block_sizes: how the kernel is cut; by default as suits the shapes and the TPU.
    implementation: see `dispatch.resolve`.
    sharding: how the arrays lie on a mesh: batch and heads may be split, lengths may not. KV heads
      that are fewer than the devices they would be split over are read by several of them.

  Returns:
    The attended values, in the query's dtype; softmax runs in float32.

  Raises:
    ValueError: shapes, dtypes or options that do not fit.
    NotImplementedError: the named implementation cannot serve an argument.
  """
  _check(query, key, value)
  query_ids, key_ids = _segments(segment_ids, query, key)
  spec = Spec(
    scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
    span=make_span(is_causal, _window(local_window_size)),
    logits_soft_cap=logits_soft_cap,
  )
  if logits_soft_cap is not None and not logits_soft_cap > 0:
    raise ValueError(f"logits_soft_cap must be positive, got {logits_soft_cap}")
  chosen = dispatch.choose(implementation, _refusal(query, key, value))
  if block_sizes is not None:
    if chosen == "xla":
      raise NotImplementedError("block_sizes: implementation 'xla' has no blocks")
    choose_blocks(block_sizes, problem_of(query, key, value, query_ids is not None))
  if sharding is not None:
    sharding.check_batch("query", query.shape)
  static = Static(spec, block_sizes, chosen, sharding)
  arrays = vary_alike(query, key, value, query_ids, key_ids)
  output, log_sum_exp = attention(static, *arrays)
  return (output, log_sum_exp) if return_residual else output


def explain(
  query: Any,
  key: Any,
  value: Any,
  *,
  is_causal: bool = False,
  local_window_size: int | tuple[int, int] | None = None,
  segment_ids: Any = None,
  block_sizes: BlockSizes | None = None,
  implementation: str | None = None,
  **_: Any,
) -> str:
  """Says what `flash_attention` would run for these arguments."""
  _check(query, key, value)
  problem = problem_of(query, key, value, segment_ids is not None)
  blocks = choose_blocks(block_sizes, problem)
  forward = (
    f"tiles of {blocks.keys} keys x {blocks.queries} queries, {blocks.keys_resident} keys resident",
    forward_bytes(problem, blocks),
  )
  span = make_span(is_causal, _window(local_window_size))
  if block_sizes is None and decoding.serves(span, query, key):
    forward = decoding.describe(query, key, value)
  return dispatch.describe(
    "flash_attention",
    implementation,
    _refusal(query, key, value),
    {
      "forward": forward,
      "backward": (
        f"tiles of {blocks.keys_backward} keys x {blocks.queries_backward} queries, "
        f"{blocks.keys_resident_backward} keys resident",
        backward_bytes(problem, blocks),
      ),
    },
  )


def _refusal(query: Any, key: Any, value: Any) -> str | None:
  """Says why the kernel cannot serve these arrays, if so."""
  for name, array in (("query", query), ("key", key), ("value", value)):
    if array.dtype not in (jnp.bfloat16, jnp.float32) or array.dtype != query.dtype:
      return f"{name}: expected bfloat16 or float32, one for all, got {array.dtype}"
    if array.shape[3] > MAX_HEAD_DIM:
      return f"{name}: expected a head dim of at most {MAX_HEAD_DIM}, got {array.shape[3]}"
    if 0 in array.shape:
      return f"{name}: it is empty, {array.shape}"
  return None


def _check(query: Any, key: Any, value: Any) -> None:
  for name, array in (("query", query), ("key", key), ("value", value)):
    if len(array.shape) != 4:
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
