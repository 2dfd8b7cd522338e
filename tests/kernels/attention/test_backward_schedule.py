"""The chunks of partial blocks, compared with the whole mask."""

import numpy as np
import pytest

from ll3m_kernels import dispatch
from ll3m_kernels.attention import backward_schedule, tile_schedule
from ll3m_kernels.attention.layout import Layout
from ll3m_kernels.attention.spec import Spec, make_span

SPANS = [
  make_span(True, None),
  make_span(True, (511, 0)),
  make_span(True, (700, 0)),
  make_span(False, (70, 200)),
  make_span(False, (0, 300)),
]


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(
  "block_q, block_kv_compute", [(512, 256), (384, 128), (1024, 512), (100, 100)]
)
def test_visible_pairs_of_a_partial_block_are_in_one_chunk(
  generation, span, block_q, block_kv_compute
):
  layout = Layout(4 * block_q, 4 * block_q, block_q, block_kv_compute, 4 * block_q, False)
  spec = Spec(1.0, span, None)
  position = np.arange(block_q)
  offsets = tile_schedule.diagonal_offsets(spec, layout)
  assert offsets
  for offset in offsets:
    distance = offset + position[:, None] - position  # [key, query]
    visible = np.ones_like(distance, bool)
    if span.right is not None:
      visible &= distance <= span.right
    if span.left is not None:
      visible &= distance >= -span.left
    counts = np.zeros_like(distance)
    found = backward_schedule.partial_block_chunks(
      spec, layout, 0, offset, dispatch.GENERATIONS[generation]
    )
    for chunk in found:
      start, size = chunk.first_key, chunk.keys.size
      counts[start : start + size, chunk.queries] += 1
      assert chunk.diagonal_offset == distance[start, chunk.queries.start]
      if chunk.full.start < chunk.full.stop:
        assert visible[start : start + size, chunk.queries][:, chunk.full].all()
    assert counts.max(initial=0) <= 1
    assert (counts >= visible).all()
    # Masked pairs along each of two edges: half a chunk, plus the rounding to 128 queries.
    step = max(chunk.keys.size for chunk in found)
    assert counts.sum() - visible.sum() <= block_q * (step + 256)
