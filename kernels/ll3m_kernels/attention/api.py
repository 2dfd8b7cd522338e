"""The public attention function, the checks of its arguments, and the choice of implementation."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.attention import decoding
from ll3m_kernels.attention.block_sizes import (
  BlockSizes,
  backward_bytes,
  choose_blocks,
  forward_bytes,
  problem_of,
)
from ll3m_kernels.attention.spec import Spec, make_span
from ll3m_kernels.attention.vjp import Heads, Static, attention
from ll3m_kernels.sharding import Sharding, check_sharding, laid_out_for, vary_alike
from ll3m_kernels.validation import finite_number, flag, floating, int32_ids, whole_number

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

  Arguments that `jax.nn.dot_product_attention` also has keep their names and meanings. Query head n
  attends to KV head n // (N / K). The output of a query that sees no key is 0, and so is its
  gradient.

  Args:
    query: Queries.
    key: Keys.
    value: Values; their head dim may differ from the keys'. They must be finite even where no query
      sees them: a masked value has weight 0, and 0 * NaN is NaN.
    scale: Factor of the scores, a Python or NumPy number; None means H**-0.5.
    is_causal: Whether query t sees only keys s <= t, also for T != S (aligned at the top left).
    local_window_size: Sizes (left, right) of a sliding window, or one number for both: query t sees
      only keys t - left <= s <= t + right.
    segment_ids: Segment ids; a query sees only keys of its own segment. One array for
      self-attention, or a pair (ids of queries, ids of keys). Ids are only compared for equality,
      and must fit in int32 (see `validation.int32_ids`).
    logits_soft_cap: Soft cap: scores become cap * tanh(scores / cap). None means no cap.
    return_residual: Whether to also return the log-sum-exp of each query's scores, in float32; it
      is -1e30 for a query that sees no key.
    block_sizes: Block sizes of the kernel; None chooses them by shapes and TPU.
    implementation: Name of the implementation; see `dispatch.resolve`.
    sharding: Placement of the arrays on a mesh: batch and heads may be split, lengths may not. If
      there are fewer KV heads than devices along the head axis, devices share KV heads.

  Returns:
    The attended values, in the query's dtype; softmax runs in float32.

  Raises:
    ValueError: Shapes, dtypes or options are invalid.
    NotImplementedError: The named implementation does not support an argument.
  """
  plan = make_plan(
    query,
    key,
    value,
    scale,
    is_causal,
    local_window_size,
    segment_ids,
    logits_soft_cap,
    return_residual,
    block_sizes,
    implementation,
    sharding,
  )
  output, log_sum_exp = attention(plan.static, *vary_alike(*plan.arrays))
  return (output, log_sum_exp) if return_residual else output


class Plan(NamedTuple):
  """A checked call, which is either run or explained.

  Attributes:
    static: Arguments of the operation that are not arrays.
    arrays: Query, key, value, and the segment ids of queries and keys, or None twice.
    text: Description of what the call runs.
  """

  static: Static
  arrays: tuple[Any, ...]
  text: str


def make_plan(
  query: Any,
  key: Any,
  value: Any,
  scale: Any,
  is_causal: Any,
  local_window_size: Any,
  segment_ids: Any,
  logits_soft_cap: Any,
  return_residual: Any,
  block_sizes: Any,
  implementation: Any,
  sharding: Any,
) -> Plan:
  """Checks the arguments of `flash_attention` and chooses the implementation."""
  query, key, value = floating("query", query), floating("key", key), floating("value", value)
  _check(query, key, value)
  flag("return_residual", return_residual)
  window = _window(local_window_size, max(query.shape[1], key.shape[1]))
  spec = Spec(
    scale=query.shape[-1] ** -0.5 if scale is None else finite_number("scale", scale),
    span=make_span(flag("is_causal", is_causal), window),
    logits_soft_cap=None
    if logits_soft_cap is None
    else finite_number("logits_soft_cap", logits_soft_cap, above=0),
  )
  query_ids, key_ids = _segments(segment_ids, query, key)
  if block_sizes is not None and not isinstance(block_sizes, BlockSizes):
    raise ValueError(f"block_sizes must be a BlockSizes or None, got {block_sizes!r}")
  check_sharding(sharding)
  if sharding is not None:
    sharding.check_batch("query", query.shape)
  own = Heads(sharding, query.shape[2], key.shape[2]).own_parts(query, key, value)
  with laid_out_for(sharding):
    refusal = _refusal(query, key, value)
    chosen = dispatch.choose(implementation, refusal)
    if block_sizes is not None and chosen == "xla":
      raise NotImplementedError("block_sizes: expected None, as implementation 'xla' has no blocks")
    kernels = {} if refusal else _kernels(spec, block_sizes, own, query_ids is not None)
    text = dispatch.describe("flash_attention", implementation, refusal, kernels)
  static = Static(spec, block_sizes, chosen, sharding)
  return Plan(static, (query, key, value, query_ids, key_ids), text)


def _kernels(
  spec: Spec, block_sizes: BlockSizes | None, own: tuple[Any, Any, Any], has_segments: bool
) -> dict[str, tuple[str, int]]:
  """Returns, for each pass, its block sizes in words, and its vector memory in bytes.

  Args:
    spec: The options of the attention call.
    block_sizes: The block sizes that the caller chose; None for the default ones.
    own: Query, key and value of one device.
    has_segments: Whether there are segment ids.

  Raises:
    ValueError: The caller's block sizes do not fit the shapes or the memory.
  """
  generation = dispatch.generation()
  problem = problem_of(*own, spec.span, has_segments)
  blocks = choose_blocks(block_sizes, problem)
  if block_sizes is None and decoding.serves(spec.span, *own[:2]):
    forward = decoding.describe(*own)
  else:
    forward = (
      f"block_q={blocks.block_q}, block_kv_compute={blocks.block_kv_compute}, "
      f"block_kv={blocks.block_kv}",
      forward_bytes(problem, blocks, generation),
    )
  backward = (
    f"block_q_backward={blocks.block_q_backward}, "
    f"block_kv_compute_backward={blocks.block_kv_compute_backward}, "
    f"block_kv_backward={blocks.block_kv_backward}",
    backward_bytes(problem, blocks, generation),
  )
  return {"forward": forward, "backward": backward}


def _refusal(query: Any, key: Any, value: Any) -> str | None:
  """Returns why the kernel does not support these arrays; None if it does."""
  for name, array in (("query", query), ("key", key), ("value", value)):
    if array.dtype not in (jnp.bfloat16, jnp.float32) or array.dtype != query.dtype:
      return f"{name}: expected bfloat16 or float32, the same for all arrays, got {array.dtype}"
    if array.shape[3] > MAX_HEAD_DIM:
      return f"{name}: expected a head dim of at most {MAX_HEAD_DIM}, got {array.shape[3]}"
  return None


def _check(query: Any, key: Any, value: Any) -> None:
  for name, array in (("query", query), ("key", key), ("value", value)):
    if len(array.shape) != 4:
      raise ValueError(f"{name} must be [batch, length, heads, head dim], got {array.shape}")
    if 0 in array.shape:
      raise ValueError(f"{name} must not be empty, got {array.shape}")
  if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0]:
    raise ValueError(
      f"query, key and value must agree in batch, and key and value in length and heads, got "
      f"{query.shape}, {key.shape} and {value.shape}"
    )
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(
      f"query and key must have the same head dim, got {query.shape[-1]} and {key.shape[-1]}"
    )
  if query.shape[2] % key.shape[2]:
    raise ValueError(
      f"query heads ({query.shape[2]}) must be a multiple of KV heads ({key.shape[2]})"
    )


def _window(size: Any, longest: int) -> tuple[int, int] | None:
  """Returns the window (left, right), each at most the longest length; None without a window."""
  if size is None:
    return None
  sizes = size if isinstance(size, tuple | list) else (size, size)
  if len(sizes) != 2:
    raise ValueError(f"local_window_size must be a number or (left, right), got {size!r}")
  left, right = (whole_number("local_window_size", x, at_least=0) for x in sizes)
  return min(left, longest), min(right, longest)


def _segments(segment_ids: Any, query: Any, key: Any) -> tuple[Any, Any]:
  if segment_ids is None:
    return None, None
  pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
  if len(pair) != 2:
    raise ValueError(
      f"segment_ids must be an array or a pair (query ids, key ids), got {len(pair)} arrays"
    )
  found = []
  for name, ids, like in zip(("query", "key"), pair, (query, key), strict=True):
    ids = int32_ids(f"segment ids of the {name}", ids)
    if ids.shape != like.shape[:2]:
      raise ValueError(
        f"segment ids of the {name} must have shape {like.shape[:2]}, got {ids.shape}"
      )
    found.append(ids)
  return found[0], found[1]
