"""How the backward pass goes through keys: in chunks whose products do not wait for each other.

The compiler computes the scores of one chunk while it takes the exponentials of another. Where the
mask cuts the keys, a chunk meets only queries that see some of them, if it is known while compiling
which do.
"""

from typing import Any, NamedTuple

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Layout, keys_at
from ll3m_kernels.block_arithmetic import LANES, up
from ll3m_kernels.dispatch import Generation

_MOST_KEYS = 256


class Chunk(NamedTuple):
  """Some keys, and the queries that they meet.

  Attributes:
    keys: their index among the resident ones.
    first: of them, among the resident ones.
    queries: of the block.
    distance: how far right of the first of these queries the first key is; None if position hides
      none of the keys from any of the queries.
    whole: of these queries, those that see all of the keys, where that is known.
  """

  keys: Any
  first: Any
  queries: slice
  distance: Any
  whole: slice


def chunk_size(keys: int) -> int:
  """Returns how many of a tile's keys are taken at a time, at most: a divisor of them."""
  return keys if keys % _MOST_KEYS else _MOST_KEYS


def of_tile(layout: Layout, tile: Any, distance: Any) -> list[Chunk]:
  """Returns the chunks of a tile, which meet all queries; see `tile_schedule.for_each_tile`."""
  size = chunk_size(layout.keys)
  queries = slice(0, layout.queries)
  return [
    Chunk(
      keys_at(layout, tile, offset, size),
      tile * layout.keys + offset,
      queries,
      None if distance is None else distance + offset,
      slice(0, 0),
    )
    for offset in range(0, layout.keys, size)
  ]


def of_square(
  spec: specs.Spec, layout: Layout, tile: Any, distance: int, generation: Generation
) -> list[Chunk]:
  """Returns the chunks of a square, as many keys as a block has queries, that the mask cuts.

  Args:
    spec: of the call.
    layout: of the kernel.
    tile: the first one of the square.
    distance: how far right of the block's first query it begins.
    generation: of the TPU.
  """
  size = next(n for n in (generation.matrix_unit, LANES, layout.keys) if layout.queries % n == 0)
  chunks = []
  for offset in range(0, layout.queries, size):
    first = distance + offset
    low, high = specs.queries_seeing(spec.span, first, first + size - 1, layout.queries)
    queries = slice(low // LANES * LANES, min(up(high, LANES), layout.queries))
    if queries.start >= queries.stop:
      continue
    low, high = specs.queries_seeing_all(spec.span, first, first + size - 1, layout.queries)
    whole = slice(
      min(up(low, LANES), queries.stop) - queries.start,
      (high if high == layout.queries else high // LANES * LANES) - queries.start,
    )
    chunks.append(
      Chunk(
        keys_at(layout, tile, offset, size),
        tile * layout.keys + offset,
        queries,
        first - queries.start,
        whole,
      )
    )
  return chunks
