"""The options of an attention call, and which keys a query sees by position.

T queries, S keys. Without a mask every query sees every key. A causal mask and a window both mean
that query t sees the keys t - left <= s <= t + right; `Span` represents both.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# Far below any score, yet finite: a row of -inf would turn into NaN.
MASKED = -1e30


class Span(NamedTuple):
  """The number of keys that a query sees on either side of itself; None for all of them."""

  left: int | None
  right: int | None


class Spec(NamedTuple):
  """The static options of an attention call.

  Attributes:
    scale: Factor of the scores.
    span: Keys that a query sees, by position.
    logits_soft_cap: Soft cap: scores become cap * tanh(scores / cap). None means no cap.
  """

  scale: float
  span: Span
  logits_soft_cap: float | None


def make_span(is_causal: bool, window: tuple[int, int] | None) -> Span:
  """Returns the span of a causal mask, a window (left, right), or both."""
  left, right = (None, None) if window is None else window
  return Span(left, 0 if is_causal else right)


def keys_seen_by_any(span: Span, first: Any, last: Any, num_keys: int) -> tuple[Any, Any]:
  """Returns the keys [low, high) that any query of first..last sees; empty if low >= high."""
  low = 0 if span.left is None else maximum(first - span.left, 0)
  high = num_keys if span.right is None else minimum(last + span.right + 1, num_keys)
  return low, high


def keys_seen_by_all(span: Span, first: Any, last: Any, num_keys: int) -> tuple[Any, Any]:
  """Returns the keys [low, high) that all queries of first..last see; empty if low >= high."""
  low = 0 if span.left is None else maximum(last - span.left, 0)
  high = num_keys if span.right is None else minimum(first + span.right + 1, num_keys)
  return low, high


def queries_seeing_any(span: Span, first: int, last: int, num_queries: int) -> tuple[int, int]:
  """Returns the queries [low, high) that see any key of first..last; empty if low >= high."""
  low = 0 if span.right is None else max(first - span.right, 0)
  high = num_queries if span.left is None else min(last + span.left + 1, num_queries)
  return low, high


def queries_seeing_all(span: Span, first: int, last: int, num_queries: int) -> tuple[int, int]:
  """Returns the queries [low, high) that see all keys of first..last; empty if low >= high."""
  low = 0 if span.right is None else max(last - span.right, 0)
  high = num_queries if span.left is None else min(first + span.left + 1, num_queries)
  return low, high


def within(span: Span, distance: Int[Array, "..."]) -> Bool[Array, "..."] | None:
  """Returns whether a query sees a key at a distance to its right; None if all are seen."""
  visible = None
  if span.right is not None:
    visible = distance <= span.right
  if span.left is not None:
    near = distance >= -span.left
    visible = near if visible is None else visible & near
  return visible


def maximum(a: Any, b: Any) -> Any:
  """Returns the larger of two numbers; a Python int if both are."""
  return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def minimum(a: Any, b: Any) -> Any:
  """Returns the smaller of two numbers; a Python int if both are."""
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def divide(a: Any, b: int) -> Any:
  """Returns a // b for a >= 0; int32 also under `jax_enable_x64`."""
  return a // b if isinstance(a, int) else jax.lax.div(a, jnp.int32(b))


def block_ranges(
  ids: Int[Array, "B L"], block: int, count: int | None = None
) -> Int[Array, "B 2 n"]:
  """Returns the least and the largest id of each of `count` blocks.

  Padding does not count: the range of a block beyond the end is empty (low > high).
  """
  batch, length = ids.shape
  count = -(-length // block) if count is None else count
  ids = ids[:, : count * block]
  length = ids.shape[1]
  limits = np.iinfo(np.int32)
  ids = ids.astype(jnp.int32)
  padding = ((0, 0), (0, count * block - length))
  low = jnp.pad(ids, padding, constant_values=limits.max).reshape(batch, count, block)
  high = jnp.pad(ids, padding, constant_values=limits.min).reshape(batch, count, block)
  return jnp.stack([jnp.min(low, axis=-1), jnp.max(high, axis=-1)], axis=1)
