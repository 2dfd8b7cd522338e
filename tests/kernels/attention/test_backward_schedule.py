"""The chunks of squares that a mask cuts, against the mask written out."""

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
@pytest.mark.parametrize("queries, keys", [(512, 256), (384, 128), (1024, 512), (100, 100)])
def test_what_a_square_shows_is_met_once(generation, span, queries, keys):
  layout = Layout(4 * queries, 4 * queries, queries, keys, 4 * queries, False)
  spec = Spec(1.0, span, None)
  position = np.arange(queries)
  cuts = tile_schedule.cuts(spec, layout)
  assert cuts
  for cut in cuts:
    right = cut + position[:, None] - position  # of a query, by key
    seen = np.ones_like(right, bool)
    if span.right is not None:
      seen &= right <= span.right
    if span.left is not None:
      seen &= right >= -span.left
    met = np.zeros_like(right)
    found = backward_schedule.of_square(spec, layout, 0, cut, dispatch.GENERATIONS[generation])
    for chunk in found:
      start, size = chunk.first, chunk.keys.size
      met[start : start + size, chunk.queries] += 1
      assert chunk.distance == right[start, chunk.queries.start]
      if chunk.whole.start < chunk.whole.stop:
        assert seen[start : start + size, chunk.queries][:, chunk.whole].all()
    assert met.max(initial=0) <= 1
    assert (met >= seen).all()
    # Along each of two edges, a chunk's own half and what rounding to 128 queries adds.
    step = max(chunk.keys.size for chunk in found)
    assert met.sum() - seen.sum() <= queries * (step + 256)
