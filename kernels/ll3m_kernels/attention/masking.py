"""The scores of a tile and their masks, for the forward and the backward kernel.

`tile_schedule` defines the words and chooses the tiles. Positions are int32, also under
`jax_enable_x64`.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.soft_cap import soft_cap

LOG2_E = math.log2(math.e)


def scale(
  spec: specs.Spec, products: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
  """Returns the scores of products Q K^T, in units of log 2, and the slope of the soft cap.

  The slope is None if there is no soft cap.
  """
  if spec.logits_soft_cap is None:
    return products * (spec.scale * LOG2_E), None
  capped, slope = soft_cap(products * spec.scale, spec.logits_soft_cap)
  return capped * LOG2_E, slope


def mask(
  spec: specs.Spec,
  scores: Float[Array, "a b"],
  keys_axis: int,
  *,
  diagonal_offset: Any = None,
  count: Any = None,
  ids: tuple[Int[Array, "..."], Int[Array, "..."]] | None = None,
) -> Float[Array, "a b"]:
  """Replaces the scores of keys that a query does not see by `MASKED`.

  Args:
    spec: The options of the attention call.
    scores: Scores of some queries and keys.
    keys_axis: Axis of the keys.
    diagonal_offset: Position of the first key minus position of the first query; None if position
      masks nothing.
    count: Number of keys that exist; None if all do.
    ids: Segment ids of the queries and of the keys, one of them a row and the other a column.
  """
  keys = jax.lax.broadcasted_iota(jnp.int32, scores.shape, keys_axis)
  conditions = []
  if diagonal_offset is not None:
    queries = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - keys_axis)
    conditions.append(specs.within(spec.span, keys - queries + diagonal_offset))
  if count is not None:
    conditions.append(keys < count)
  if ids is not None:
    conditions.append(ids[0] == ids[1])
  visible = None
  for condition in conditions:
    if condition is not None:
      visible = condition if visible is None else visible & condition
  return scores if visible is None else jnp.where(visible, scores, specs.MASKED)


def mask_edges(
  spec: specs.Spec,
  scores: Float[Array, "a b"],
  keys_axis: int,
  diagonal_offset: Any,
  full: slice,
) -> Float[Array, "a b"]:
  """Masks by position, except where the scores are known to be fully visible; see `mask`.

  Args:
    spec: The options of the attention call.
    scores: Scores of some queries and keys.
    keys_axis: Axis of the keys.
    diagonal_offset: Position of the first key minus position of the first query.
    full: Range of the last axis in which nothing is masked; may be empty.
  """
  if full.start >= full.stop:
    return mask(spec, scores, keys_axis, diagonal_offset=diagonal_offset)
  size = scores.shape[1]
  parts = []
  for start, stop in itertools.pairwise((0, full.start, full.stop, size)):
    part = scores[:, start:stop]
    if start < stop and start != full.start:
      offset = diagonal_offset + (start if keys_axis else -start)
      part = mask(spec, part, keys_axis, diagonal_offset=offset)
    if start < stop:
      parts.append(part)
  return jnp.concatenate(parts, axis=1)


def zero_beyond(x: Array, axis: int, count: Any) -> Array:
  """Zeroes x beyond the first `count` entries of an axis, where a block holds arbitrary values."""
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, x, 0)


def dot(left: Array, right: Array, contract: tuple[int, int] = (1, 0)) -> Float[Array, "m n"]:
  """Multiplies matrices into float32: exactly from bfloat16, and in six passes from float32."""
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    left,
    right,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def column(row: Int[Array, "1 n"]) -> Int[Array, "n 128"]:
  """Turns a row into a column that is repeated in every lane."""
  return jnp.broadcast_to(row, (128, row.shape[1])).T
