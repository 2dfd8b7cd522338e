"""Which tiles a block of queries meets, and where position cuts them.

Where block_q and the tile size divide one another, the mask's edges are at the same offsets in all
blocks. These offsets are found while compiling (`cuts`); `forward_schedule` and `backward_schedule`
use them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Ids, Layout

# What the mask cuts in one of so few places is compiled for each of them.
_MOST_CUTS = 4


def cuts(spec: specs.Spec, layout: Layout) -> list[int] | None:
  """Returns where the squares begin that the mask cuts, from a block's first query to the right.

  A square is as many keys as a block has queries. Where tiles and resident keys fit squares, there
  are only a few such places, which are the same for all blocks; else None is returned.
  """
  size = layout.queries
  if size % layout.keys or layout.resident % size:
    return None
  found = set()
  left, right = spec.span
  for limit in (right, None if left is None else -left):
    if limit is not None:
      # The squares that hold a key at this distance of some query.
      found.update(range(limit // size * size, limit + size, size))
  found = {
    cut
    for cut in found
    if not (right is None or cut + size - 1 <= right)
    or not (left is None or cut - (size - 1) >= -left)
  }
  return sorted(found) if len(found) <= _MOST_CUTS else None


class Ends(NamedTuple):
  """What a call has to do beside its own part, since there it can run while products do.

  Attributes:
    starts: what `start` would have done, see `for_each_tile`.
    finishes: what `finish` would do.
  """

  starts: bool = False
  finishes: bool = False


def for_each_tile(
  spec: specs.Spec,
  layout: Layout,
  query_block: Any,
  first_key: Any,
  ids: Ids | None,
  body: Callable[[Any, Any, bool, Ends], None],
  squares: Callable[[Sequence[tuple[Any, int]], bool, Ends], None] | None = None,
  fit_together: Callable[[Sequence[tuple[Any, int]]], bool] | None = None,
  start: Callable[[], None] | None = None,
  finish: Callable[[], None] | None = None,
) -> None:
  """Calls `body(tile, distance, may_end, ends)` for the resident tiles that a block's queries see.

  Args:
    spec: of the call.
    layout: of the kernel.
    query_block: number of the block of queries.
    first_key: position of the first resident key, a multiple of `layout.keys`.
    ids: the segment ids, if any.
    body: gets a tile's number among the resident ones; how far right of the first query it
      begins, or None if position hides none of it from any query; whether it may reach beyond the
      last key; and what else it has to do.
    squares: the same for the squares that `cuts` found, if it did: gets the first tile and the
      distance of each. It is given all of them at once where all are resident and seen, since one
      update of the softmax is cheaper than several; else, or where ids may skip some, one by one.
    fit_together: whether there is memory for several of them at once; None if there never is.
    start: called before all others, unless one of them is told to do it: that happens only where
      there are no ids and all keys are resident.
    finish: called after all others, unless one of them is told to do it, likewise.
  """
  first_query = query_block * layout.queries
  last_query = specs.minimum(first_query + layout.queries, layout.num_queries) - 1
  base, count = specs.divide(first_key, layout.keys), layout.resident // layout.keys
  found = cuts(spec, layout) if squares is not None else None
  unit = 1 if found is None else layout.queries // layout.keys  # what is whole, in tiles
  # Others may be skipped, or have only a part of the keys.
  can_tell = None not in (start, finish) and ids is None and layout.resident >= layout.num_keys
  start, finish = start or _nothing, finish or _nothing

  def local(tile: Any) -> Any:
    return specs.minimum(specs.maximum(tile - base, 0), count)

  def where_ids_meet(tile: Any, size: int, function: Callable[[], None]) -> None:
    if ids is None:
      function()
      return
    low, high = ids.query_ranges[0, 0, query_block], ids.query_ranges[0, 1, query_block]
    pl.when(
      functools.reduce(
        jnp.logical_or,
        [
          (ids.key_ranges[0, 0, base + tile + k] <= high)
          & (ids.key_ranges[0, 1, base + tile + k] >= low)
          for k in range(size)
        ],
      )
    )(function)

  def visit(tile: Any, distance: Any, may_end: bool) -> None:
    where_ids_meet(tile, 1, lambda: body(tile, distance, may_end, Ends()))

  def visit_cut(tile: Any) -> None:
    visit(tile, (base + tile) * layout.keys - first_query, may_end)

  def visit_whole(tile: Any) -> None:
    visit(tile, None, False)

  may_end = layout.num_keys % layout.keys != 0
  low, high = specs.some_see(spec.span, first_query, last_query, layout.num_keys)
  first = local(specs.divide(low, layout.keys))
  stop = specs.maximum(local(specs.divide(high + layout.keys - 1, layout.keys)), first)
  # Queries beyond the last one count here, so that what is whole does not depend on the block.
  low, high = specs.all_see(
    spec.span, first_query, first_query + layout.queries - 1, layout.num_keys
  )
  whole_start = unit * specs.divide(low + unit * layout.keys - 1, unit * layout.keys)
  whole_stop = unit * specs.divide(specs.maximum(high, 0), unit * layout.keys)
  whole_start = specs.minimum(specs.maximum(local(whole_start), first), stop)
  whole_stop = specs.minimum(specs.maximum(local(whole_stop), whole_start), stop)
  # Not of two tiles: a loop over the other one is unrolled, and then both take memory at once.
  if can_tell and spec.span == (None, None) and not may_end and stop == whole_stop != 2:
    start()
    _loop(whole_start, whole_stop - 1, visit_whole)
    body(jnp.int32(whole_stop - 1), None, False, Ends(finishes=True))
    return
  if found is None:
    start()
    _loop(first, whole_start, visit_cut)
    _loop(whole_start, whole_stop, visit_whole)
    _loop(whole_stop, stop, visit_cut)
    finish()
    return
  square_may_end = layout.num_keys % layout.queries != 0
  last = layout.num_keys // layout.queries * unit - base  # the square that the keys end in
  places = [((query_block + cut // layout.queries) * unit - base, cut) for cut in found]
  seen = [(tile + unit > first) & (tile < stop) for tile, _ in places]
  # Ids skip squares one by one.
  if ids is None and len(places) > 1 and fit_together is not None and fit_together(places):
    all_seen = functools.reduce(jnp.logical_and, seen)
    pl.when(~all_seen if can_tell else True)(start)
    pl.when(all_seen)(lambda: squares(places, square_may_end, Ends(starts=can_tell)))
    seen = [one & ~all_seen for one in seen]
    can_tell = False  # which one is the last depends on the block
  else:
    start()
  _loop(whole_start, whole_stop, visit_whole)
  # Under a causal mask, queries see themselves, and nothing beyond.
  sees_itself = spec.span.right == 0 and 0 in found and layout.num_queries <= layout.num_keys
  can_tell = can_tell and sees_itself
  last_stop = stop
  for (tile, cut), is_seen in zip(places, seen, strict=True):
    ends = Ends(finishes=can_tell and cut == 0)
    pl.when(is_seen)(
      functools.partial(
        where_ids_meet,
        tile,
        unit,
        functools.partial(squares, [(tile, cut)], square_may_end, ends),
      )
    )
    last_stop = jnp.where(tile == last, last, last_stop)
  if square_may_end and not sees_itself:  # also where the mask leaves it whole
    _loop(specs.maximum(last, first), last_stop, lambda tile: visit(tile, None, may_end))
  if not can_tell:
    finish()


def _nothing() -> None:
  pass


def _loop(start: Any, stop: Any, body: Callable[[Any], None]) -> None:
  if isinstance(start, int) and isinstance(stop, int) and start >= stop:
    return

  def step(tile, carry):
    body(tile)
    return carry

  jax.lax.fori_loop(jnp.int32(start), jnp.int32(stop), step, None)
