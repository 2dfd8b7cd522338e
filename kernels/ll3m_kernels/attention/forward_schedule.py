"""How the forward pass follows the edges of a mask through a block of queries.

Queries are taken in steps, one after the other in one straight piece of code: the compiler computes
the scores of one step while it takes the exponentials of another. Where the mask cuts a step, its
bands meet only keys that some query of theirs sees; scores of several bands are still one product,
so that K is loaded into the matrix unit for all of them at once, and V unless it is turned
(`block_sizes.is_turned`). All of it is known while compiling.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Layout
from ll3m_kernels.block_arithmetic import LANES, up
from ll3m_kernels.dispatch import Generation

# Of the matrix unit's size. Higher steps load keys less often, lower ones overlap sooner.
_BANDS_PER_STEP = 4
# Of a piece: while its product runs, the exponentials of the next piece are taken.
_MOST_KEYS = 1024


class Piece(NamedTuple):
  """Some queries and keys that they meet.

  Attributes:
    tile: what the keys are of, a tile or a square, by its first tile among the resident ones.
    distance: how far right of the block's first query that begins; None if position hides none of
      the keys from any of the queries.
    rows: the queries, of the block.
    columns: the keys, of that tile or square.
  """

  tile: Any
  distance: Any
  rows: slice
  columns: slice


class Band(NamedTuple):
  """Queries that are masked alike.

  Attributes:
    rows: the queries, of the block.
    seen: the pieces that they are in, by number, and the keys of each that they all see, where that
      is known.
  """

  rows: slice
  seen: list[tuple[int, slice]]


class Step(NamedTuple):
  """Queries that one update of the softmax serves: all that they see is in `pieces`, once."""

  pieces: list[Piece]
  bands: list[Band]


def step_size(queries: int, generation: Generation) -> int:
  """Returns how many of a block's queries are taken at a time: a divisor of them."""
  unit = generation.matrix_unit
  sizes = [*range(_BANDS_PER_STEP * unit, 0, -unit), LANES]
  return next((size for size in sizes if queries % size == 0), queries)


def rows_of_steps(layout: Layout, generation: Generation) -> list[slice]:
  """Returns the queries of each step through a block."""
  size = step_size(layout.queries, generation)
  return [slice(row, row + size) for row in range(0, layout.queries, size)]


def whole(layout: Layout, tile: Any, distance: Any, generation: Generation) -> list[Step]:
  """Returns the steps through a tile of which all queries meet all keys; see `Piece`."""
  columns = [
    slice(start, min(start + _MOST_KEYS, layout.keys))
    for start in range(0, layout.keys, _MOST_KEYS)
  ]
  seen = [(n, slice(0, 0)) for n in range(len(columns))]
  return [
    Step([Piece(tile, distance, rows, some) for some in columns], [Band(rows, seen)])
    for rows in rows_of_steps(layout, generation)
  ]


def staircase(
  spec: specs.Spec,
  layout: Layout,
  squares: Sequence[tuple[Any, int]],
  generation: Generation,
) -> list[Step]:
  """Returns the steps through squares, as many keys as a block has queries, that the mask cuts.

  The largest come first: the matrix unit has the scores of the next one to do while exponentials
  are taken of one, but nothing during the last.

  Args:
    spec: of the call.
    layout: of the kernel.
    squares: the first tile of each, and how far right of the first query it begins.
    generation: of the TPU.
  """
  size = step_size(layout.queries, generation)
  unit = generation.matrix_unit
  if len(squares) > 1 and size % (2 * unit) == 0:
    size //= 2  # there is more to do for each query
  height = unit if size % unit == 0 else size
  steps = []
  for row in range(0, layout.queries, size):
    bands = [slice(low, low + height) for low in range(row, row + size, height)]
    pieces = [piece for square in squares for piece in _cover(spec, layout, bands, *square)]
    found = [Band(rows, list(_seen_of(spec, layout, rows, pieces))) for rows in bands]
    if pieces:
      steps.append(Step(pieces, [band for band in found if band.seen]))
  return sorted(steps, key=_count_scores, reverse=True)


def fit_memory(layout: Layout, steps: Sequence[Step], generation: Generation) -> bool:
  """Returns whether no step has a quarter more scores than memory is counted for, which has room.

  Both edges of a window at once take more than one square where steps cannot be halved.
  """
  most = 1.25 * step_size(layout.queries, generation) * layout.queries
  return all(_count_scores(step) <= most for step in steps)


def _count_scores(step: Step) -> int:
  return sum(_size(piece.rows) * _size(piece.columns) for piece in step.pieces)


def _cover(
  spec: specs.Spec, layout: Layout, bands: Sequence[slice], tile: Any, cut: int
) -> list[Piece]:
  """Covers what some bands see of a square with pieces, of which no two share a key."""
  seen = [_columns(spec, layout, rows, cut)[0] for rows in bands]
  edges = {edge for columns in seen for edge in (columns.start, columns.stop)}
  edges |= set(range(min(edges), max(edges), _MOST_KEYS))
  found: list[Piece] = []
  for start, stop in itertools.pairwise(sorted(edges)):
    meet = [
      rows
      for rows, columns in zip(bands, seen, strict=True)
      if columns.start <= start and stop <= columns.stop
    ]
    if meet:  # neighbours, as both edges of a mask only go to the right
      found.append(Piece(tile, cut, slice(meet[0].start, meet[-1].stop), slice(start, stop)))
  return found


def _seen_of(
  spec: specs.Spec, layout: Layout, rows: slice, pieces: Sequence[Piece]
) -> Iterator[tuple[int, slice]]:
  """Yields the pieces that a band is in, and the keys of each that all of it sees."""
  for number, piece in enumerate(pieces):
    if piece.rows.start <= rows.start < piece.rows.stop:
      all_see = _columns(spec, layout, rows, piece.distance)[1]
      start = max(all_see.start, piece.columns.start)
      yield number, slice(start, max(min(all_see.stop, piece.columns.stop), start))


def _columns(spec: specs.Spec, layout: Layout, rows: slice, cut: int) -> tuple[slice, slice]:
  """Returns the keys of a square that some of the queries see, and those that all of them see."""
  left, right = spec.span
  start, whole_start = 0, 0
  if left is not None:
    start = max(rows.start - left - cut, 0) // LANES * LANES
    whole_start = up(max(rows.stop - 1 - left - cut, 0), LANES)
  stop = whole_stop = layout.queries
  if right is not None:
    stop = min(up(max(rows.stop + right - cut, 0), LANES), layout.queries)
    seen = rows.start + right - cut + 1
    whole_stop = stop if seen >= stop else seen // LANES * LANES
  return slice(start, max(stop, start)), slice(whole_start, max(whole_stop, whole_start))


def _size(some: slice) -> int:
  return some.stop - some.start
