"""What the forward and the backward kernel do alike with a tile: cut, score and mask it.

A tile is some keys and a block of queries. Positions are int32, also under `jax_enable_x64`. Which
tiles a block meets is for `walk` to say.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.soft_cap import soft_cap

LOG2_E = math.log2(math.e)


class Layout(NamedTuple):
  """How a kernel cuts its problem.

  Attributes:
    num_queries: T.
    num_keys: S.
    queries: of a tile.
    keys: of a tile.
    resident: keys that a grid step has at hand; a multiple of `keys`.
    has_segments: whether segment ids restrict what is seen.
  """

  num_queries: int
  num_keys: int
  queries: int
  keys: int
  resident: int
  has_segments: bool


class Ids(NamedTuple):
  """References to the segment ids of a grid step: ids as rows, ranges [least, largest] of blocks.

  Attributes:
    queries: [1, 1, queries] of a tile.
    keys: [1, 1, resident].
    query_ranges: [1, 2, blocks of queries], in scalar memory.
    key_ranges: [1, 2, tiles of keys], in scalar memory.
  """

  queries: Any
  keys: Any
  query_ranges: Any
  key_ranges: Any


def id_inputs(
  layout: Layout,
  query_ids: Int[Array, "B T"],
  key_ids: Int[Array, "B S"],
  query_index: Callable[..., tuple],
  key_index: Callable[..., tuple],
) -> tuple[list[Array], list[pl.BlockSpec]]:
  """Returns the arrays that `Ids` refers to, and how they are cut.

  Args:
    layout: of the kernel.
    query_ids: of the queries.
    key_ids: of the keys.
    query_index: grid indices -> (batch, block of queries).
    key_index: grid indices -> (batch, block of resident keys).
  """
  query_ranges = specs.block_ranges(query_ids, layout.queries)
  # Also for tiles that lie wholly beyond the last key.
  resident_blocks = pl.cdiv(layout.num_keys, layout.resident)
  key_ranges = specs.block_ranges(
    key_ids, layout.keys, resident_blocks * layout.resident // layout.keys
  )

  def row(size, index):
    def place(*grid):
      batch, block = index(*grid)
      return batch, 0, block

    return pl.BlockSpec((1, 1, size), place)

  arrays = [query_ids[:, None].astype(jnp.int32), key_ids[:, None].astype(jnp.int32)]
  return (
    [*arrays, query_ranges, key_ranges],
    [row(layout.queries, query_index), row(layout.resident, key_index)]
    + [ranges_spec(query_ranges), ranges_spec(key_ranges)],
  )


def ranges_spec(ranges: Int[Array, "B 2 n"]) -> pl.BlockSpec:
  """Has all ranges of a batch row in scalar memory, where the first grid index is the row."""
  return pl.BlockSpec((1, 2, ranges.shape[2]), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM)


def keys_at(layout: Layout, tile: Any, offset: int, size: int) -> Any:
  """Returns the index of some keys of a tile among the resident ones."""
  if layout.keys == layout.resident:
    return pl.ds(offset, size)
  # A computed start has to be a multiple of 128; what is not, is the only tile.
  return pl.ds(pl.multiple_of(tile * layout.keys + offset, 128), size)


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
