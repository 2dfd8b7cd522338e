"""The loss of a linear head and its gradients, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ll3m_kernels import linear_cross_entropy
from ll3m_kernels.cross_entropy import xla
from tests.kernels.cross_entropy.oracle import (
  assert_right,
  draw,
  objective,
  oracle,
  run,
)
from tests.kernels.tolerances import assert_close

OPTIONS = {
  "plain": {},
  "bias": {"bias": True},
  "soft cap": {"logits_soft_cap": 2.0},
  "z-loss": {"z_loss": 1e-2},
  "bool mask": {"mask": "bool"},
  "float mask": {"mask": "float"},
  "empty mask": {"mask": "empty"},
  "all": {"bias": True, "logits_soft_cap": 5.0, "z_loss": 1e-2, "mask": "float"},
}


@pytest.mark.parametrize("layout", ["dv", "vd"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients(narrow_chunks, options, dtype, layout):
  """700 columns are two chunks of 256 and a remainder of 188."""
  case = draw(layout=layout, dtype=dtype, **OPTIONS[options])
  assert_right(run(case), oracle(case))


@settings(max_examples=12, deadline=None)
@given(
  tokens=st.sampled_from([(), (0,), (1,), (2, 3), (33,)]),
  features=st.integers(1, 40),
  vocabulary=st.integers(1, 600),
  layout=st.sampled_from(["dv", "vd"]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  most_columns=st.sampled_from([128, 8192]),
  seed=st.integers(0, 100),
)
def test_any_shape(tokens, features, vocabulary, layout, dtype, most_columns, seed):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "_MOST_COLUMNS", most_columns)
    case = draw(tokens, features, vocabulary, layout=layout, dtype=dtype, seed=seed, z_loss=0.01)
    assert_right(run(case), oracle(case))


@pytest.mark.parametrize("chunk", [0, 1])
def test_logits_of_any_size(narrow_chunks, chunk):
  """Logits exceed all previous ones by more than exp can hold, in the first chunk or later."""
  case = draw(scale=1.0)
  steps = np.where(np.arange(700) // 128 == 2 * chunk + 1, 60.0, 1.0)
  case = case._replace(head=case.head * jnp.asarray(steps, jnp.float32)[None])
  expected = oracle(case)
  assert expected.loss.max() > 100
  assert_right(run(case), expected)
  # One element of a batch sums its chunks twice, which does not affect the others.
  heads = jnp.stack([draw(scale=1.0).head, case.head, case.head / 60])
  losses = jax.vmap(
    lambda head: linear_cross_entropy(case.hidden, head, case.labels)[0]
  )(heads)  # fmt: skip
  for head, loss in zip(heads, losses, strict=True):
    assert_close(loss, oracle(case._replace(head=head)).loss, jnp.float32)


def test_masked_tokens_may_have_nan_hidden_states_and_any_label():
  case = draw(mask="float", bias=True, z_loss=1e-2)
  gone = np.asarray(case.mask) == 0
  assert gone.any() and not gone.all()
  poisoned = case._replace(
    hidden=jnp.where(gone[:, None], jnp.nan, case.hidden),
    labels=jnp.where(gone, -100, case.labels),
  )
  actual = run(poisoned)
  assert_right(actual, oracle(case))
  assert not np.asarray(actual.hidden_bar)[gone].any()
  mask_bar = jax.grad(
    lambda mask: jnp.sum(linear_cross_entropy(case.hidden, case.head, case.labels, mask=mask)[0])
  )(case.mask)
  unmasked = oracle(case._replace(mask=None, bias=None)).loss
  assert_close(mask_bar, np.where(gone, 0.0, unmasked), jnp.float32)


def test_labels_outside_the_vocabulary_match_no_column():
  case = draw(vocabulary=300)
  labels = np.array([-1, -100, 300, 2**31 - 1, -(2**31), 299, 0, 5, 300, 301, 428, 127])
  case = case._replace(labels=jnp.asarray(labels, jnp.int32))
  actual = run(case)
  assert_right(actual, oracle(case))
  assert not np.asarray(actual.correct)[(labels < 0) | (labels >= 300)].any()


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.uint64])
def test_labels_wider_than_int32_match_no_column(unchecked, dtype):
  """They do not wrap around to a column."""
  case = draw(2, vocabulary=9)
  wide = {np.uint32: 2**31 + 3}.get(dtype, 2**32 + 3)
  labels = np.array([3, wide], dtype)
  expected = oracle(case._replace(labels=np.array([3, -1])))
  assert_right(run(case._replace(labels=labels)), expected)
  with jax.enable_x64(True):  # with traced labels
    objective_of = jax.jit(lambda labels: objective(*case[:2], None, case._replace(labels=labels)))
    _, results = objective_of(labels)
  assert_close(results[0], expected.loss, jnp.float32)
  np.testing.assert_array_equal(results[2], expected.correct)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_a_bias_of_minus_inf_removes_columns(narrow_chunks, layout, first):
  """Whole chunks are removed, including the first one."""
  case = draw(vocabulary=900, layout=layout, z_loss=1e-2)
  gone = np.arange(900) < 400 if first else np.arange(900) >= 400
  labels = np.where(gone[case.labels], (np.asarray(case.labels) + 450) % 900, case.labels)
  labels = np.where(gone[labels], 450 if first else 50, labels)
  bias = jnp.asarray(np.where(gone, -np.inf, 0.0), jnp.float32)
  case = case._replace(labels=jnp.asarray(labels, jnp.int32), bias=bias)
  # The same loss without these columns.
  kept = np.flatnonzero(~gone)
  axis = layout.index("v")
  expected = oracle(
    case._replace(
      head=jnp.take(case.head, kept, axis=axis),
      labels=np.searchsorted(kept, labels),
      bias=bias[kept],
    )
  )
  head_bar = np.zeros(case.head.shape)
  head_bar[(slice(None), kept) if axis else kept] = expected.head_bar
  bias_bar = np.zeros(900)
  bias_bar[kept] = expected.bias_bar
  assert_right(run(case), expected._replace(head_bar=head_bar, bias_bar=bias_bar))


def test_labels_and_tokens_without_a_column(narrow_chunks):
  """A removed label has a loss of inf; a token with no column left has no gradients."""
  case = draw(3, vocabulary=600, bias=True, z_loss=1e-2)
  taken = case._replace(bias=case.bias.at[7].set(-jnp.inf), labels=jnp.array([7, 8, -1]))
  actual = run(taken)
  assert actual.loss[0] == np.inf and np.isfinite(actual.loss[1:]).all()
  for bar in (actual.hidden_bar, actual.head_bar, actual.bias_bar):
    assert np.isfinite(bar).all()
  nothing = run(taken._replace(bias=jnp.full(600, -jnp.inf)))
  np.testing.assert_array_equal(nothing.loss, [np.inf, np.inf, -np.inf])
  assert not nothing.correct.any()
  for bar in (nothing.hidden_bar, nothing.head_bar, nothing.bias_bar):
    assert not np.asarray(bar).any()
  # With z_loss=0, the z-loss is 0.
  case = taken._replace(bias=jnp.full(600, -jnp.inf), options={"head_layout": "dv"})
  assert not np.asarray(run(case).penalty).any()


def test_the_slope_of_a_saturated_cap_is_accurate(narrow_chunks):
  """For slopes of 1e-8, 1 - tanh^2 would be 0 or have no correct digit."""
  case = draw(scale=0.5, logits_soft_cap=1.0)
  case = case._replace(bias=jnp.full(700, 10.0))
  actual, expected = run(case), oracle(case)
  slope = 4 * np.exp(-20.0)
  assert slope < np.abs(expected.bias_bar).max() < 100 * slope
  # The oracle's own slope is only accurate to 1e-16.
  np.testing.assert_allclose(actual.bias_bar, expected.bias_bar, rtol=1e-3, atol=1e-4 * slope)


def test_ties_count_as_correct():
  ones = jnp.ones((1, 4))
  labels = jnp.asarray([3])
  *_, correct = linear_cross_entropy(ones, jnp.ones((4, 9)), labels, return_correct=True)
  assert correct.item() is True


def test_mixed_dtypes(narrow_chunks):
  """Results are computed in the wider dtype; each gradient has the dtype of its input."""
  case = draw()
  case = case._replace(head=case.head.astype(jnp.bfloat16))
  assert_right(run(case), oracle(case))
  case = draw()
  case = case._replace(hidden=case.hidden.astype(jnp.float16).astype(jnp.bfloat16))
  assert_right(run(case), oracle(case))
