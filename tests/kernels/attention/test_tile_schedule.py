"""The visited tiles of each block of queries, compared with the whole mask, and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention import tile_schedule
from ll3m_kernels.attention.layout import Layout
from ll3m_kernels.attention.spec import Span
from tests.kernels import numpy_kernels

# num_queries, num_keys, block_q, block_kv_compute, block_kv. Blocks are multiples of 128, or whole
# lengths.
LAYOUTS = {
  "one_block": (512, 512, 512, 256, 512),
  "blocks": (1024, 1024, 256, 256, 1024),
  "tall": (1024, 1024, 512, 256, 1024),
  "two_tiles": (512, 1024, 512, 512, 1024),
  "wide_tiles": (1024, 1024, 256, 512, 1024),
  "odd": (600, 600, 256, 256, 768),
  "odd_tall": (700, 700, 512, 256, 1024),
  "in_parts": (1024, 1024, 256, 256, 512),
  "more_keys": (256, 1000, 256, 256, 1024),
  "fewer_keys": (1024, 384, 256, 128, 512),
  "odd_partial_blocks": (512, 1280, 512, 256, 1536),
  "single": (1, 1, 1, 1, 1),
}
SPANS = {
  "full": Span(None, None),
  "causal": Span(None, 0),
  "window": Span(255, 0),
  "odd_window": Span(300, 0),
  "wide_window": Span(511, 0),
  "itself": Span(0, 0),
  "both_sides": Span(130, 70),
  "left": Span(200, None),
}
# All spans with memory for the partial blocks of both edges at once, and two spans without.
CASES = {f"{name}-together": (span, True) for name, span in SPANS.items()} | {
  f"{name}-one_by_one": (SPANS[name], False) for name in ("odd_window", "both_sides")
}


@pytest.mark.parametrize("span, together", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_visible_pair_is_visited_once_between_start_and_finish(layout, span, together):
  layout = Layout(*layout, has_segments=False)
  spec = specs.Spec(1.0, span, None)
  blocks = -(-layout.num_queries // layout.block_q)
  parts = -(-layout.num_keys // layout.block_kv)

  def kernel(counts_ref, state_ref):
    i, j = pl.program_id(0), pl.program_id(1)
    first_key = j * layout.block_kv if parts > 1 else 0

    @pl.when((i == 0) & (j == 0))
    def _():
      counts_ref[...] = jnp.zeros_like(counts_ref)
      state_ref[...] = jnp.zeros_like(state_ref)

    def count(column, condition):
      # Columns: calls of start, calls of finish, visits before start, visits after finish.
      state_ref[i, column] += jnp.int32(condition)

    def start():
      pl.when(j == 0)(lambda: count(0, True))

    def finish():
      pl.when(j == parts - 1)(lambda: count(1, True))

    def visit(tile, size, diagonal_offset, may_overrun, ends):
      if ends.starts:
        start()
      count(2, state_ref[i, 0] == 0)
      count(3, state_ref[i, 1] != 0)
      begin = first_key + tile * layout.block_kv_compute
      key = jax.lax.broadcasted_iota(jnp.int32, (layout.block_q, size), 1)
      query = jax.lax.broadcasted_iota(jnp.int32, (layout.block_q, size), 0)
      visible = jnp.ones_like(key, bool)
      if diagonal_offset is not None:
        visible = specs.within(span, key - query + diagonal_offset)
      if may_overrun:
        visible &= begin + key < layout.num_keys
      rows = pl.ds(i * layout.block_q, layout.block_q)
      counts_ref[rows, pl.ds(begin, size)] += visible.astype(int)
      if ends.finishes:
        finish()

    def body(tile, diagonal_offset, may_overrun, ends):
      visit(tile, layout.block_kv_compute, diagonal_offset, may_overrun, ends)

    def partial_body(partial_blocks, may_overrun, ends):
      for number, (tile, offset) in enumerate(partial_blocks):
        is_first, is_last = number == 0, number == len(partial_blocks) - 1
        block_ends = tile_schedule.Ends(ends.starts and is_first, ends.finishes and is_last)
        visit(tile, layout.block_q, offset, may_overrun, block_ends)

    tile_schedule.for_each_tile(
      spec, layout, i, first_key, None, body, partial_body, lambda _: together, start, finish
    )

  rows, columns = blocks * layout.block_q, parts * layout.block_kv
  with numpy_kernels.interpreted():
    counts, state = pl.pallas_call(
      kernel,
      grid=(blocks, parts),
      out_shape=(
        jax.ShapeDtypeStruct((rows, columns), jnp.int32),
        jax.ShapeDtypeStruct((blocks, 4), jnp.int32),
      ),
    )()
  query, key = np.arange(layout.num_queries)[:, None], np.arange(layout.num_keys)
  left, right = (10**6 if side is None else side for side in span)
  expected = (query - left <= key) & (key <= query + right)
  np.testing.assert_array_equal(counts[: layout.num_queries, : layout.num_keys], expected)
  np.testing.assert_array_equal(state, np.tile([1, 1, 0, 0], (blocks, 1)))
