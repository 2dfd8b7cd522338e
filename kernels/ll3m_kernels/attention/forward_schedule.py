"""The order of the forward pass within a tile or a partial block: steps of pieces and bands.

A step is a range of queries that share one update of the softmax. Steps are unrolled, so that the
compiler computes the scores of one step while it takes the exponentials of another. In a partial
block, the queries of a step are split into bands, and each band is multiplied only by the keys that
some query of it sees. Bands that see the same keys form one piece, which is one product: K is then
loaded into the matrix unit once for all of them, and V too unless acc is transposed
(`block_sizes.is_transposed`). The schedule is static. See the glossary of `tile_schedule`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Layout
from ll3m_kernels.block_arithmetic import LANES, up
from ll3m_kernels.dispatch import Generation

# A band is as high as the matrix unit. Higher steps load keys less often; lower steps overlap
# sooner.
_BANDS_PER_STEP = 4
# While the product of a piece runs, the exponentials of the next piece are taken.
_MAX_PIECE_KEYS = 1024


class Piece(NamedTuple):
  """Some queries and the keys that they are multiplied by in one product.

  Attributes:
    tile: Index, in the block_kv, of the tile or of the first tile of the partial block.
    diagonal_offset: Diagonal offset of that tile or partial block; None if it is full.
    rows: Range of the queries in the block_q.
    columns: Range of the keys in the tile or partial block.
  """

  tile: Any
  diagonal_offset: Any
  rows: slice
  columns: slice


class Band(NamedTuple):
  """Queries that are in the same pieces.

  Attributes:
    rows: Range of the queries in the block_q.
    full_columns: Index of each piece of the band, and the range of keys in it that all queries of
      the band see; the range is empty if unknown.
  """

  rows: slice
  full_columns: list[tuple[int, slice]]


class Step(NamedTuple):
  """Queries that share one update of the softmax; `pieces` have each key that they see once."""

  pieces: list[Piece]
  bands: list[Band]


def step_size(block_q: int, generation: Generation) -> int:
  """Returns the number of queries of a step, a divisor of block_q."""
  unit = generation.matrix_unit
  sizes = [*range(_BANDS_PER_STEP * unit, 0, -unit), LANES]
  return next((size for size in sizes if block_q % size == 0), block_q)


def rows_of_steps(layout: Layout, generation: Generation) -> list[slice]:
  """Returns the range of queries of each step of a block_q."""
  size = step_size(layout.block_q, generation)
  return [slice(row, row + size) for row in range(0, layout.block_q, size)]


def tile_steps(
  layout: Layout, tile: Any, diagonal_offset: Any, generation: Generation
) -> list[Step]:
  """Returns the steps of a tile, in which each query is multiplied by all keys; see `Piece`."""
  columns = [
    slice(start, min(start + _MAX_PIECE_KEYS, layout.block_kv_compute))
    for start in range(0, layout.block_kv_compute, _MAX_PIECE_KEYS)
  ]
  full_columns = [(n, slice(0, 0)) for n in range(len(columns))]
  return [
    Step([Piece(tile, diagonal_offset, rows, some) for some in columns], [Band(rows, full_columns)])
    for rows in rows_of_steps(layout, generation)
  ]


def partial_block_steps(
  spec: specs.Spec,
  layout: Layout,
  partial_blocks: Sequence[tuple[Any, int]],
  generation: Generation,
) -> list[Step]:
  """Returns the steps of partial blocks that are processed together.

  The largest steps come first: the exponentials of a step overlap the scores of the next one, and
  those of the last step overlap nothing.

  Args:
    spec: The options of the attention call.
    layout: The block sizes of the kernel.
    partial_blocks: Index of the first tile, and diagonal offset, of each partial block.
    generation: The TPU generation.
  """
  size = step_size(layout.block_q, generation)
  unit = generation.matrix_unit
  if len(partial_blocks) > 1 and size % (2 * unit) == 0:
    size //= 2  # each query has more scores
  height = unit if size % unit == 0 else size
  steps = []
  for row in range(0, layout.block_q, size):
    bands = [slice(low, low + height) for low in range(row, row + size, height)]
    pieces = [piece for block in partial_blocks for piece in _cover(spec, layout, bands, *block)]
    found = [Band(rows, list(_full_columns(spec, layout, rows, pieces))) for rows in bands]
    if pieces:
      steps.append(Step(pieces, [band for band in found if band.full_columns]))
  return sorted(steps, key=_count_scores, reverse=True)


def fit_memory(layout: Layout, steps: Sequence[Step], generation: Generation) -> bool:
  """Returns whether every step's scores fit in 1.25 times the VMEM budgeted for one step.

  The two edges of a window together exceed one partial block where steps cannot be halved.
  """
  most = 1.25 * step_size(layout.block_q, generation) * layout.block_q
  return all(_count_scores(step) <= most for step in steps)


def _count_scores(step: Step) -> int:
  return sum(_size(piece.rows) * _size(piece.columns) for piece in step.pieces)


def _cover(
  spec: specs.Spec, layout: Layout, bands: Sequence[slice], tile: Any, diagonal_offset: int
) -> list[Piece]:
  """Covers the visible keys of some bands in a partial block by pieces that share no key."""
  visible = [_visible_columns(spec, layout, rows, diagonal_offset)[0] for rows in bands]
  edges = {edge for columns in visible for edge in (columns.start, columns.stop)}
  edges |= set(range(min(edges), max(edges), _MAX_PIECE_KEYS))
  found: list[Piece] = []
  for start, stop in itertools.pairwise(sorted(edges)):
    within = [
      rows
      for rows, columns in zip(bands, visible, strict=True)
      if columns.start <= start and stop <= columns.stop
    ]
    if within:  # adjacent bands, since both edges of a mask move only to the right
      rows = slice(within[0].start, within[-1].stop)
      found.append(Piece(tile, diagonal_offset, rows, slice(start, stop)))
  return found


def _full_columns(
  spec: specs.Spec, layout: Layout, rows: slice, pieces: Sequence[Piece]
) -> Iterator[tuple[int, slice]]:
  """Yields the index of each piece of a band, and the keys that all queries of the band see."""
  for number, piece in enumerate(pieces):
    if piece.rows.start <= rows.start < piece.rows.stop:
      full = _visible_columns(spec, layout, rows, piece.diagonal_offset)[1]
      start = max(full.start, piece.columns.start)
      yield number, slice(start, max(min(full.stop, piece.columns.stop), start))


def _visible_columns(
  spec: specs.Spec, layout: Layout, rows: slice, offset: int
) -> tuple[slice, slice]:
  """Returns the keys of a partial block that any query of `rows` sees, and those that all see."""
  left, right = spec.span
  start, full_start = 0, 0
  if left is not None:
    start = max(rows.start - left - offset, 0) // LANES * LANES
    full_start = up(max(rows.stop - 1 - left - offset, 0), LANES)
  stop = full_stop = layout.block_q
  if right is not None:
    stop = min(up(max(rows.stop + right - offset, 0), LANES), layout.block_q)
    seen_by_first = rows.start + right - offset + 1
    full_stop = stop if seen_by_first >= stop else seen_by_first // LANES * LANES
  return slice(start, max(stop, start)), slice(full_start, max(full_stop, full_start))


def _size(some: slice) -> int:
  return some.stop - some.start
