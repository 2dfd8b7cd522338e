"""How the attention kernels cut queries, keys and segment ids into the blocks of a grid step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ll3m_kernels.attention import spec as specs


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
