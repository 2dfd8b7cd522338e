"""The order of the backward pass within a tile or a partial block: chunks of keys.

The products of one chunk do not depend on another chunk, so the compiler computes the scores of one
while it takes the exponentials of another. In a partial block whose diagonal offset is static, a
chunk is multiplied only by queries that see some of its keys. See the glossary of `tile_schedule`.
"""

from typing import Any, NamedTuple

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Layout, keys_at
from ll3m_kernels.block_arithmetic import LANES, up
from ll3m_kernels.dispatch import Generation

_MAX_CHUNK_KEYS = 256


class Chunk(NamedTuple):
  """Some keys and the queries that they are multiplied by.

  Attributes:
    keys: Index of the keys in the block_kv.
    first_key: Index of the first of them in the block_kv.
    queries: Range of the queries in the block_q.
    diagonal_offset: Position of the first key minus position of the first of these queries; None
      if position masks nothing.
    full: Range, within `queries`, of queries that see all of the keys; empty if unknown.
  """

  keys: Any
  first_key: Any
  queries: slice
  diagonal_offset: Any
  full: slice


def chunk_size(block_kv_compute: int) -> int:
  """Returns the largest number of keys of a chunk, a divisor of block_kv_compute."""
  return block_kv_compute if block_kv_compute % _MAX_CHUNK_KEYS else _MAX_CHUNK_KEYS


def tile_chunks(layout: Layout, tile: Any, diagonal_offset: Any) -> list[Chunk]:
  """Returns the chunks of a tile, which include all queries; see `tile_schedule.for_each_tile`."""
  size = chunk_size(layout.block_kv_compute)
  queries = slice(0, layout.block_q)
  return [
    Chunk(
      keys_at(layout, tile, offset, size),
      tile * layout.block_kv_compute + offset,
      queries,
      None if diagonal_offset is None else diagonal_offset + offset,
      slice(0, 0),
    )
    for offset in range(0, layout.block_kv_compute, size)
  ]


def partial_block_chunks(
  spec: specs.Spec, layout: Layout, tile: Any, diagonal_offset: int, generation: Generation
) -> list[Chunk]:
  """Returns the chunks of a partial block.

  Args:
    spec: The options of the attention call.
    layout: The block sizes of the kernel.
    tile: Index, in the block_kv, of the first tile of the partial block.
    diagonal_offset: Diagonal offset of the partial block.
    generation: The TPU generation.
  """
  sizes = (generation.matrix_unit, LANES, layout.block_kv_compute)
  size = next(n for n in sizes if layout.block_q % n == 0)
  chunks = []
  for offset in range(0, layout.block_q, size):
    first = diagonal_offset + offset
    low, high = specs.queries_seeing_any(spec.span, first, first + size - 1, layout.block_q)
    queries = slice(low // LANES * LANES, min(up(high, LANES), layout.block_q))
    if queries.start >= queries.stop:
      continue
    low, high = specs.queries_seeing_all(spec.span, first, first + size - 1, layout.block_q)
    full = slice(
      min(up(low, LANES), queries.stop) - queries.start,
      (high if high == layout.block_q else high // LANES * LANES) - queries.start,
    )
    chunks.append(
      Chunk(
        keys_at(layout, tile, offset, size),
        tile * layout.block_kv_compute + offset,
        queries,
        first - queries.start,
        full,
      )
    )
  return chunks
