"""The online softmax over pieces of keys, compared with float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from ll3m_kernels.attention import online_softmax, spec
from tests.kernels import numpy_kernels

ROWS, HEAD = 256, 64
SIZES = (384, 100, 40, 256)  # keys per piece; 100 and 40 fill no whole registers


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("is_transposed", [True, False], ids=["transposed", "not_transposed"])
def test_two_updates_of_two_pieces(is_transposed, scale):
  rng = np.random.default_rng(0)
  scores = [rng.normal(scale=20.0, size=(ROWS, size)) for size in SIZES]
  scores[0][3] = 300.0  # all later weights vanish
  scores[3][5] = 300.0  # all earlier weights vanish
  for some in scores:
    some[9] = spec.MASKED  # sees nothing
  values = [rng.normal(size=(size, HEAD)) for size in SIZES]

  def kernel(*refs):
    score_refs, value_refs, (output_ref, log_sum_exp_ref, *state) = refs[:4], refs[4:8], refs[8:]
    softmax = online_softmax.Softmax(*state, is_transposed, scale)
    rows = slice(128, 128 + ROWS)
    softmax.start(rows)
    for pieces in ((0, 1), (2, 3)):
      update = online_softmax.Update(softmax, rows, {n: score_refs[n][...] for n in pieces})
      assert update.has_piece(pieces[0]) and not update.has_piece(4)
      for n in pieces:
        product = update.take_weights(n) @ value_refs[n][...]
        update.add(product.T if is_transposed else product)
      update.store()
    softmax.finish(rows, output_ref, log_sum_exp_ref)

  rows = 128 + ROWS
  acc = (HEAD, rows) if is_transposed else (rows, HEAD)
  shapes = [(1, 1, rows, HEAD), (1, 1, 1, rows), acc, (rows, 128), (rows, 128)]
  with jax.default_matmul_precision("highest"), numpy_kernels.interpreted():
    output, log_sum_exp, *_ = pl.pallas_call(
      kernel,
      out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
    )(*(jnp.asarray(x, jnp.float32) for x in (*scores, *values)))

  logits = np.concatenate(scores, axis=1) * (scale * math.log(2.0))
  m = logits.max(axis=1, keepdims=True)
  weights = np.exp(logits - m)
  l = weights.sum(axis=1, keepdims=True)
  expected = weights @ np.concatenate(values) / l
  expected_log_sum_exp = (m + np.log(l))[:, 0]
  expected[9], expected_log_sum_exp[9] = 0.0, spec.MASKED
  np.testing.assert_allclose(output[0, 0, 128:], expected, atol=2e-5)
  np.testing.assert_allclose(log_sum_exp[0, 0, 0, 128:], expected_log_sum_exp, rtol=2e-6, atol=2e-5)


def test_to_row_transposes_a_column_that_is_repeated_in_every_lane():
  column = np.random.default_rng(1).normal(size=(300, 1)).astype(np.float32)
  row = online_softmax.to_row(jnp.asarray(np.repeat(column, 128, axis=1)))
  np.testing.assert_array_equal(row, column.T)


@pytest.mark.parametrize("size", [64, 128, 200])
def test_widen_repeats_a_lane(size):
  column = np.arange(8.0)[:, None]
  widened = online_softmax.widen(jnp.asarray(np.repeat(column, 128, axis=1)), size)
  np.testing.assert_array_equal(widened, np.repeat(column, size, axis=1))
