"""The block sizes of the attention kernels, and the segment ids of a grid step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ll3m_kernels.attention import spec as specs


class Layout(NamedTuple):
  """The lengths and block sizes of one kernel; see the glossary of `tile_schedule`.

  Attributes:
    num_queries: T.
    num_keys: S.
    block_q: Number of queries of a tile.
    block_kv_compute: Number of keys of a tile.
    block_kv: Number of keys that a grid step holds in memory; a multiple of `block_kv_compute`.
    has_segments: Whether segment ids mask scores.
  """

  num_queries: int
  num_keys: int
  block_q: int
  block_kv_compute: int
  block_kv: int
  has_segments: bool


class Ids(NamedTuple):
  """References to the segment ids of a grid step.

  Attributes:
    queries: Ids of a block of queries, [1, 1, block_q].
    keys: Ids of a block of keys, [1, 1, block_kv].
    query_ranges: Least and largest id of each block of queries, [1, 2, num_blocks], in scalar
      memory.
    key_ranges: Least and largest id of the keys of each tile, [1, 2, num_tiles], in scalar memory.
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
  """Returns the arrays that `Ids` refers to, and their block specs.

  Args:
    layout: The block sizes of the kernel.
    query_ids: Segment ids of the queries.
    key_ids: Segment ids of the keys.
    query_index: Maps grid indices to (batch, index of the block_q).
    key_index: Maps grid indices to (batch, index of the block_kv).
  """
  query_ranges = specs.block_ranges(query_ids, layout.block_q)
  # Includes tiles that lie wholly beyond the last key.
  num_kv_blocks = pl.cdiv(layout.num_keys, layout.block_kv)
  key_ranges = specs.block_ranges(
    key_ids, layout.block_kv_compute, num_kv_blocks * layout.block_kv // layout.block_kv_compute
  )

  def row(size, index):
    def place(*grid):
      batch, block = index(*grid)
      return batch, 0, block

    return pl.BlockSpec((1, 1, size), place)

  arrays = [query_ids[:, None].astype(jnp.int32), key_ids[:, None].astype(jnp.int32)]
  return (
    [*arrays, query_ranges, key_ranges],
    [row(layout.block_q, query_index), row(layout.block_kv, key_index)]
    + [ranges_spec(query_ranges), ranges_spec(key_ranges)],
  )


def ranges_spec(ranges: Int[Array, "B 2 n"]) -> pl.BlockSpec:
  """Places all ranges of a batch row in scalar memory; the first grid index is the row."""
  return pl.BlockSpec((1, 2, ranges.shape[2]), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM)


def keys_at(layout: Layout, tile: Any, offset: int, size: int) -> Any:
  """Returns the index, within a block_kv, of `size` keys of a tile, from its key `offset` on."""
  if layout.block_kv_compute == layout.block_kv:
    return pl.ds(offset, size)
  # A computed start must be a multiple of 128; a tile of any other size is the only tile.
  return pl.ds(pl.multiple_of(tile * layout.block_kv_compute + offset, 128), size)
