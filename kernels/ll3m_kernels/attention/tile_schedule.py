r"""The tiles that a block of queries visits, and where the edges of the mask cross them.

Glossary of the attention kernels; the words are those of jax's flash_attention and
splash_attention:

  block_q           Number of queries of a grid step.
  block_kv          Number of keys that a grid step holds in vector memory.
  block_kv_compute  Number of keys of a tile; divides block_kv.
  tile              A tile is block_q queries by block_kv_compute keys.
  full block        Position hides none of its keys from any of its queries.
  empty block       Position hides all of its keys from all of its queries; it is skipped.
  partial block     An edge of the mask crosses it. Where `diagonal_offsets` finds the offsets, a
                    partial block is block_q queries by block_q keys: one tile or several.
  diagonal offset   Position of the first key of a block minus position of its first query.
  m, l, acc         State of the online softmax for a query: maximum of the scores so far, sum of
                    the weights, and sum of the values times their weights.
  alpha             Factor that rescales l and acc when m grows from m_prev to m_next.

The blocks of one block of queries under a sliding window:

  keys ->    ....\####\....    . empty    \ partial    # full

Where block_q is a multiple of block_kv_compute and block_kv a multiple of block_q, all blocks of
queries have the same diagonal offsets. `diagonal_offsets` finds them at trace time;
`forward_schedule` and `backward_schedule` use them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Ids, Layout

# The code for a partial block is compiled once per diagonal offset, up to this many of them.
_MAX_DIAGONAL_OFFSETS = 4


def diagonal_offsets(spec: specs.Spec, layout: Layout) -> list[int] | None:
  """Returns the diagonal offsets of the partial blocks of a block of queries.

  Returns None where the block sizes do not divide one another or there are too many offsets.
  """
  block_q = layout.block_q
  if block_q % layout.block_kv_compute or layout.block_kv % block_q:
    return None
  found = set()
  left, right = spec.span
  for limit in (right, None if left is None else -left):
    if limit is not None:
      # The blocks in which some key is `limit` positions to the right of some query.
      found.update(range(limit // block_q * block_q, limit + block_q, block_q))
  found = {
    offset
    for offset in found
    if not (right is None or offset + block_q - 1 <= right)
    or not (left is None or offset - (block_q - 1) >= -left)
  }
  return sorted(found) if len(found) <= _MAX_DIAGONAL_OFFSETS else None


class Ends(NamedTuple):
  """The start and finish of a block of queries, delegated to a call so that they overlap products.

  Attributes:
    starts: Whether the call must also do the work of `start`; see `for_each_tile`.
    finishes: Whether the call must also do the work of `finish`.
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
  partial_body: Callable[[Sequence[tuple[Any, int]], bool, Ends], None] | None = None,
  fit_together: Callable[[Sequence[tuple[Any, int]]], bool] | None = None,
  start: Callable[[], None] | None = None,
  finish: Callable[[], None] | None = None,
) -> None:
  """Calls `body(tile, diagonal_offset, may_overrun, ends)` for the tiles that are not empty.

  Args:
    spec: The options of the attention call.
    layout: The block sizes of the kernel.
    query_block: Index of the block of queries.
    first_key: Position of the first key of the block_kv, a multiple of block_kv_compute.
    ids: The segment ids, if any.
    body: Receives the index of a tile in the block_kv; the tile's diagonal offset, or None if the
      tile is full; whether the tile may reach beyond the last key; and the delegated `Ends`.
    partial_body: Processes partial blocks in place of `body` where `diagonal_offsets` finds their
      offsets. Receives (index of the first tile, diagonal offset) of each block, and the last two
      arguments of `body`. It gets all partial blocks in one call where none is empty and all are
      in the block_kv, since one update of the softmax is cheaper than several. Otherwise, and
      where segment ids may skip some blocks, it gets one block per call.
    fit_together: Returns whether the given partial blocks fit in memory at once; None if they
      never do.
    start: Called first, unless it is delegated to a call. That happens only where there are no
      segment ids and the block_kv holds all keys.
    finish: Called last, unless it is delegated, under the same conditions.
  """
  block_q, block_kv_compute = layout.block_q, layout.block_kv_compute
  first_query = query_block * block_q
  last_query = specs.minimum(first_query + block_q, layout.num_queries) - 1
  base, count = specs.divide(first_key, block_kv_compute), layout.block_kv // block_kv_compute
  offsets = diagonal_offsets(spec, layout) if partial_body is not None else None
  # Full blocks are counted in multiples of a partial block, or else of a tile.
  tiles_per_block = 1 if offsets is None else block_q // block_kv_compute
  block_keys = tiles_per_block * block_kv_compute
  # Otherwise a call may be skipped, or see only some of the keys.
  can_delegate = None not in (start, finish) and ids is None and layout.block_kv >= layout.num_keys
  start, finish = start or _nothing, finish or _nothing

  def local(tile: Any) -> Any:
    return specs.minimum(specs.maximum(tile - base, 0), count)

  def where_segments_overlap(tile: Any, size: int, function: Callable[[], None]) -> None:
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

  def visit(tile: Any, diagonal_offset: Any, may_overrun: bool) -> None:
    where_segments_overlap(tile, 1, lambda: body(tile, diagonal_offset, may_overrun, Ends()))

  def visit_partial(tile: Any) -> None:
    visit(tile, (base + tile) * block_kv_compute - first_query, may_overrun)

  def visit_full(tile: Any) -> None:
    visit(tile, None, False)

  may_overrun = layout.num_keys % block_kv_compute != 0
  # Tiles first..stop are not empty; full_start..full_stop are full.
  low, high = specs.keys_seen_by_any(spec.span, first_query, last_query, layout.num_keys)
  first = local(specs.divide(low, block_kv_compute))
  stop = specs.maximum(local(specs.divide(high + block_kv_compute - 1, block_kv_compute)), first)
  # Includes queries beyond the last one, so that every block of queries has the same full blocks.
  low, high = specs.keys_seen_by_all(
    spec.span, first_query, first_query + block_q - 1, layout.num_keys
  )
  full_start = tiles_per_block * specs.divide(low + block_keys - 1, block_keys)
  full_stop = tiles_per_block * specs.divide(specs.maximum(high, 0), block_keys)
  full_start = specs.minimum(specs.maximum(local(full_start), first), stop)
  full_stop = specs.minimum(specs.maximum(local(full_stop), full_start), stop)
  # Not for two tiles: a loop over the other one is unrolled, and then both need memory at once.
  if can_delegate and spec.span == (None, None) and not may_overrun and stop == full_stop != 2:
    start()
    _loop(full_start, full_stop - 1, visit_full)
    body(jnp.int32(full_stop - 1), None, False, Ends(finishes=True))
    return
  if offsets is None:
    start()
    _loop(first, full_start, visit_partial)
    _loop(full_start, full_stop, visit_full)
    _loop(full_stop, stop, visit_partial)
    finish()
    return
  block_may_overrun = layout.num_keys % block_q != 0
  tail = layout.num_keys // block_q * tiles_per_block - base  # the block in which the keys end
  partial_blocks = [
    ((query_block + offset // block_q) * tiles_per_block - base, offset) for offset in offsets
  ]
  nonempty = [(tile + tiles_per_block > first) & (tile < stop) for tile, _ in partial_blocks]
  # Segment ids skip partial blocks one by one.
  if (
    ids is None
    and len(partial_blocks) > 1
    and fit_together is not None
    and fit_together(partial_blocks)
  ):
    all_nonempty = functools.reduce(jnp.logical_and, nonempty)
    pl.when(~all_nonempty if can_delegate else True)(start)
    pl.when(all_nonempty)(
      lambda: partial_body(partial_blocks, block_may_overrun, Ends(starts=can_delegate))
    )
    nonempty = [one & ~all_nonempty for one in nonempty]
    can_delegate = False  # the last call depends on the block of queries
  else:
    start()
  _loop(full_start, full_stop, visit_full)
  # Under a causal mask, queries see the block on the diagonal and nothing to its right.
  ends_on_diagonal = spec.span.right == 0 and 0 in offsets and layout.num_queries <= layout.num_keys
  can_delegate = can_delegate and ends_on_diagonal
  tail_stop = stop
  for (tile, offset), is_nonempty in zip(partial_blocks, nonempty, strict=True):
    ends = Ends(finishes=can_delegate and offset == 0)
    pl.when(is_nonempty)(
      functools.partial(
        where_segments_overlap,
        tile,
        tiles_per_block,
        functools.partial(partial_body, [(tile, offset)], block_may_overrun, ends),
      )
    )
    tail_stop = jnp.where(tile == tail, tail, tail_stop)
  if block_may_overrun and not ends_on_diagonal:  # the tail, unless a partial block
    _loop(specs.maximum(tail, first), tail_stop, lambda tile: visit(tile, None, may_overrun))
  if not can_delegate:
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
