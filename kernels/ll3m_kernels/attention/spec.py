"""What an attention call asks for, and which keys its queries see.

T queries, S keys. Without a mask every query sees every key; a causal mask and a window both say
that query t sees the keys t - left <= s <= t + right, so they are one thing: `Span`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# Far below any score, yet finite: a row of -inf would turn into NaN.
MASKED = -1e30


class Span(NamedTuple):
  """How far a query sees to either side; None for to the end."""

  left: int | None
  right: int | None


class Spec(NamedTuple):
  """The options of a call that do not change with its data.

  Attributes:
    scale: multiplies the scores.
    span: which keys a query sees, by position.
    logits_soft_cap: scores become cap * tanh(scores / cap).
  """

  scale: float
  span: Span
  logits_soft_cap: float | None


def make_span(is_causal: bool, window: tuple[int, int] | None) -> Span:
  """Joins a causal mask and a window (left, right)."""
  left, right = (None, None) if window is None else window
  return Span(left, 0 if is_causal else right)


def keys_seen_by_any(span: Span, first: Any, last: Any, num_keys: int) -> tuple[Any, Any]:
  """Returns the keys [low, high) that some query of first..last may see; maybe low >= high."""
  low = 0 if span.left is None else maximum(first - span.left, 0)
  high = num_keys if span.right is None else minimum(last + span.right + 1, num_keys)
  return low, high


def keys_seen_by_all(span: Span, first: Any, last: Any, num_keys: int) -> tuple[Any, Any]:
  """Returns the keys [low, high) that all queries of first..last see; maybe low >= high."""
  low = 0 if span.left is None else maximum(last - span.left, 0)
  high = num_keys if span.right is None else minimum(first + span.right + 1, num_keys)
  return low, high


def queries_seeing_any(span: Span, first: int, last: int, num_queries: int) -> tuple[int, int]:
  """Returns the queries [low, high) that see some key of first..last; maybe low >= high."""
  low = 0 if span.right is None else max(first - span.right, 0)
  high = num_queries if span.left is None else min(last + span.left + 1, num_queries)
  return low, high


def queries_seeing_all(span: Span, first: int, last: int, num_queries: int) -> tuple[int, int]:
  """Returns the queries [low, high) that see all keys first..last; maybe low >= high."""
  low = 0 if span.right is None else max(last - span.right, 0)
  high = num_queries if span.left is None else min(first + span.left + 1, num_queries)
  return low, high


def within(span: Span, distance: Int[Array, "..."]) -> Bool[Array, "..."] | None:
  """Returns whether a query sees a key that stands so far to its right; None if all do."""
  visible = None
  if span.right is not None:
    visible = distance <= span.right
  if span.left is not None:
    near = distance >= -span.left
    visible = near if visible is None else visible & near
  return visible


def maximum(a: Any, b: Any) -> Any:
  """Returns the larger of two numbers, of Python where both are."""
  return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def minimum(a: Any, b: Any) -> Any:
  """Returns the smaller of two numbers, of Python where both are."""
  return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def divide(a: Any, b: int) -> Any:
  """Returns a // b of a number that is not negative; int32 also under `jax_enable_x64`."""
  return a // b if isinstance(a, int) else jax.lax.div(a, jnp.int32(b))


def block_ranges(
  ids: Int[Array, "B L"], block: int, count: int | None = None
) -> Int[Array, "B 2 n"]:
  """Returns the least and the largest id of every block, of `count` ones; a tail has neither."""
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
