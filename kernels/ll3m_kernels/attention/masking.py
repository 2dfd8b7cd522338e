"""Scores of a tile and their masks, for the forward and the backward kernel.

A tile is some keys and a block of queries. Positions are int32, also under `jax_enable_x64`. Which
tiles a block meets is for `tile_schedule` to say.
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
  """Turns products into scores in units of log 2, with the slope of the soft cap there, if any."""
  if spec.logits_soft_cap is None:
    return products * (spec.scale * LOG2_E), None
  capped, slope = soft_cap(products * spec.scale, spec.logits_soft_cap)
  return capped * LOG2_E, slope


def mask(
  spec: specs.Spec,
  scores: Float[Array, "a b"],
  keys_axis: int,
  *,
  distance: Any = None,
  count: Any = None,
  ids: tuple[Int[Array, "..."], Int[Array, "..."]] | None = None,
) -> Float[Array, "a b"]:
  """Lowers the scores of what is not seen to `MASKED`.

  Args:
    spec: of the call.
    scores: of some keys and queries.
    keys_axis: which axis the keys are on.
    distance: how far right of the first query the first key is; None if position cuts nothing.
    count: how many of the keys exist; None if all do.
    ids: segment ids of queries and keys, one of them a row and the other one a column.
  """
  keys = jax.lax.broadcasted_iota(jnp.int32, scores.shape, keys_axis)
  conditions = []
  if distance is not None:
    queries = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - keys_axis)
    conditions.append(specs.within(spec.span, keys - queries + distance))
  if count is not None:
    conditions.append(keys < count)
  if ids is not None:
    conditions.append(ids[0] == ids[1])
  seen = None
  for condition in conditions:
    if condition is not None:
      seen = condition if seen is None else seen & condition
  return scores if seen is None else jnp.where(seen, scores, specs.MASKED)


def mask_edges(
  spec: specs.Spec, scores: Float[Array, "a b"], keys_axis: int, distance: Any, whole: slice
) -> Float[Array, "a b"]:
  """Masks what position hides, but for what is known to be seen; see `mask`.

  Args:
    spec: of the call.
    scores: of some keys and queries.
    keys_axis: which axis the keys are on.
    distance: how far right of the first query the first key is.
    whole: of the last axis, where nothing is hidden; may be empty.
  """
  if whole.start >= whole.stop:
    return mask(spec, scores, keys_axis, distance=distance)
  size = scores.shape[1]
  parts = []
  for start, stop in itertools.pairwise((0, whole.start, whole.stop, size)):
    part = scores[:, start:stop]
    if start < stop and start != whole.start:
      part = mask(spec, part, keys_axis, distance=distance + (start if keys_axis else -start))
    if start < stop:
      parts.append(part)
  return jnp.concatenate(parts, axis=1)


def existing(x: Array, axis: int, count: Any) -> Array:
  """Zeroes what lies beyond the first `count` along an axis: there a block holds anything."""
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < count, x, 0)


def dot(left: Array, right: Array, contract: tuple[int, int] = (1, 0)) -> Float[Array, "m n"]:
  """Multiplies matrices in float32: exactly from bfloat16, and in six passes from float32."""
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    left,
    right,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def column(row: Int[Array, "1 n"]) -> Int[Array, "n 128"]:
  """Turns a row into a column, which stands in every lane."""
  return jnp.broadcast_to(row, (128, row.shape[1])).T
