"""What the forward and the backward kernel do alike: walking tiles, scoring and masking them.

A tile is [keys, queries] of scores. Positions are int32 throughout, also under `jax_enable_x64`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from ll3m_kernels.attention import spec as specs

LOG2_E = math.log2(math.e)
_CHUNK = 256


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
  key_ranges = specs.block_ranges(key_ids, layout.keys)

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


class Chunk(NamedTuple):
  """Some keys of a tile.

  Attributes:
    index: of these keys among the resident ones.
    offset: position of the first one, counted from the first resident key.
    size: how many they are.
  """

  index: Any
  offset: Any
  size: int


def chunks_of(layout: Layout, tile: Any) -> list[Chunk]:
  """Cuts a tile into chunks whose products do not wait for each other.

  The compiler then computes the scores of one while it takes the exponentials of another: by its
  own estimate the forward pass takes 9% fewer cycles on a v5e than with whole tiles of 1024 keys,
  and 10% fewer on a v6e (T = 4096, H = 128, no mask).
  """
  if layout.keys % _CHUNK:
    # A computed start has to be a multiple of 128; what is not, is the only tile.
    whole = layout.keys == layout.resident
    index = slice(None) if whole else pl.ds(pl.multiple_of(tile * layout.keys, 128), layout.keys)
    return [Chunk(index, tile * layout.keys, layout.keys)]
  offsets = [tile * layout.keys + start for start in range(0, layout.keys, _CHUNK)]
  return [Chunk(pl.ds(pl.multiple_of(o, _CHUNK), _CHUNK), o, _CHUNK) for o in offsets]


def for_each_tile(
  spec: specs.Spec,
  layout: Layout,
  query_block: Any,
  first_key: Any,
  ids: Ids | None,
  body: Callable[[Any, bool], None],
) -> None:
  """Calls `body(tile, is_masked)` for the resident tiles that the queries of a block see.

  Args:
    spec: of the call.
    layout: of the kernel.
    query_block: number of the block of queries.
    first_key: position of the first resident key, a multiple of `layout.keys`.
    ids: the segment ids, if any.
    body: gets a tile's number among the resident ones, and whether the mask may cut it.
  """
  first_query = query_block * layout.queries
  last_query = specs.minimum(first_query + layout.queries, layout.num_queries) - 1
  base, count = specs.divide(first_key, layout.keys), layout.resident // layout.keys

  def local(tile: Any) -> Any:
    return specs.minimum(specs.maximum(tile - base, 0), count)

  low, high = specs.some_see(spec.span, first_query, last_query, layout.num_keys)
  start = local(specs.divide(low, layout.keys))
  stop = specs.maximum(local(specs.divide(high + layout.keys - 1, layout.keys)), start)
  if ids is not None:
    query_low = ids.query_ranges[0, 0, query_block]
    query_high = ids.query_ranges[0, 1, query_block]

    def where_ids_meet(tile):
      meet = (ids.key_ranges[0, 0, base + tile] <= query_high) & (
        ids.key_ranges[0, 1, base + tile] >= query_low
      )
      pl.when(meet)(lambda: body(tile, True))

    _loop(start, stop, where_ids_meet)
    return
  low, high = specs.all_see(spec.span, first_query, last_query, layout.num_keys)
  full_start = specs.minimum(
    specs.maximum(local(specs.divide(low + layout.keys - 1, layout.keys)), start), stop
  )
  full_stop = specs.minimum(specs.maximum(local(specs.divide(high, layout.keys)), full_start), stop)
  _loop(start, full_start, lambda tile: body(tile, True))
  _loop(full_start, full_stop, lambda tile: body(tile, False))
  _loop(full_stop, stop, lambda tile: body(tile, True))


def scale(
  spec: specs.Spec, products: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
  """Turns products into scores in units of log 2, with the slope of the soft cap there, if any."""
  if spec.logits_soft_cap is None:
    return products * (spec.scale * LOG2_E), None
  capped = jnp.tanh(products * (spec.scale / spec.logits_soft_cap))
  return capped * (spec.logits_soft_cap * LOG2_E), 1.0 - capped * capped


def mask(
  spec: specs.Spec,
  layout: Layout,
  query_block: Any,
  first_key: Any,
  chunk: Chunk,
  ids: Ids | None,
) -> Bool[Array, "s t"] | None:
  """Returns which query of a block sees which key of a chunk; None if nothing is cut.

  Args:
    spec: of the call.
    layout: of the kernel.
    query_block: number of the block of queries.
    first_key: position of the first resident key.
    chunk: the keys.
    ids: the segment ids, if any.
  """
  shape = (chunk.size, layout.queries)
  first_key = first_key + chunk.offset
  first_query = query_block * layout.queries
  keys = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  distance = keys - jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (first_key - first_query)
  conditions = [specs.within(spec.span, distance)]
  if layout.num_keys % layout.keys:
    conditions.append(keys < layout.num_keys - first_key)
  if ids is not None:
    conditions.append(_column(ids.keys[0, :, chunk.index]) == ids.queries[0])
  seen = None
  for condition in conditions:
    if condition is not None:
      seen = condition if seen is None else seen & condition
  return seen


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


def _column(row: Int[Array, "1 s"]) -> Int[Array, "s 1"]:
  return jnp.broadcast_to(row, (128, row.shape[1])).T[:, :1]


def _loop(start: Any, stop: Any, body: Callable[[Any], None]) -> None:
  if isinstance(start, int) and isinstance(stop, int) and start >= stop:
    return

  def step(tile, carry):
    body(tile)
    return carry

  jax.lax.fori_loop(jnp.int32(start), jnp.int32(stop), step, None)
