"""The loss of a linear head against float64 NumPy: values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ll3m_kernels import linear_cross_entropy
from tests.kernels.tolerances import assert_close


def oracle(hidden, head, labels, layout, bias, mask, cap, z_loss):
  """Returns loss, z-loss and the gradients of the sum of both."""
  hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
  weight = head if layout == "dv" else head.T
  logits = hidden @ weight + (0 if bias is None else np.asarray(bias, np.float64))
  slope = 1.0
  if cap is not None:
    slope = 1 - np.tanh(logits / cap) ** 2
    logits = cap * np.tanh(logits / cap)
  largest = logits.max(-1, keepdims=True)
  log_z = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
  mask = np.ones(len(labels)) if mask is None else np.asarray(mask, np.float64)
  picked = np.take_along_axis(logits, np.asarray(labels)[:, None], -1)
  softmax = np.exp(logits - log_z)
  onehot = np.eye(logits.shape[1])[np.asarray(labels)]
  bar = mask[:, None] * (softmax * (1 + 2 * z_loss * log_z) - onehot) * slope
  head_bar = hidden.T @ bar
  return (
    mask * (log_z - picked)[:, 0],
    mask * z_loss * log_z[:, 0] ** 2,
    bar @ weight.T,
    head_bar if layout == "dv" else head_bar.T,
    bar.sum(0),
  )


def draw(tokens, size, vocabulary, layout, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shape = (size, vocabulary) if layout == "dv" else (vocabulary, size)
  return (
    jnp.asarray(rng.normal(size=(tokens, size)), dtype),
    jnp.asarray(rng.normal(size=shape) * 0.3, dtype),
    jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32),
    jnp.asarray(rng.normal(size=vocabulary), jnp.float32),
    jnp.asarray(rng.integers(0, 2, tokens), bool),
  )


def run(hidden, head, labels, bias, mask, **options):
  def loss(hidden, head, bias):
    values = linear_cross_entropy(hidden, head, labels, bias=bias, mask=mask, **options)
    return sum(map(jnp.sum, values)), values

  argnums = (0, 1) if bias is None else (0, 1, 2)
  gradient = jax.jit(jax.grad(loss, argnums=argnums, has_aux=True))
  bars, values = gradient(hidden, head, bias)
  return (*values, *bars)


@pytest.mark.parametrize("layout", ["dv", "vd"])
@pytest.mark.parametrize(
  ("tokens", "vocabulary", "has_bias", "has_mask", "cap", "z_loss"),
  [
    (5, 37, True, True, None, 0.0),
    (1, 3, False, False, None, 1e-3),
    (6, 9001, True, False, 4.0, 1e-2),  # two chunks
    (4, 16_500, False, True, None, 0.0),  # three
  ],
)
def test_values_and_gradients(layout, tokens, vocabulary, has_bias, has_mask, cap, z_loss):
  hidden, head, labels, bias, mask = draw(tokens, 24, vocabulary, layout)
  bias, mask = bias if has_bias else None, mask if has_mask else None
  options = {"head_layout": layout, "logits_soft_cap": cap, "z_loss": z_loss}
  actual = run(hidden, head, labels, bias, mask, **options)
  expected = oracle(hidden, head, labels, layout, bias, mask, cap, z_loss)
  for i, (ours, right) in enumerate(zip(actual, expected, strict=False)):
    assert_close(ours, right, jnp.float32, name=f"result {i}")


@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_bfloat16_gradients_are_summed_in_float32(layout):
  """Each within one rounding to bfloat16 of the largest: over 4,096 tokens and 9,001 words."""
  hidden, head, labels, _, _ = draw(4096, 16, 9001, layout, jnp.bfloat16)
  actual = run(hidden, head, labels, None, None, head_layout=layout)
  expected = oracle(hidden, head, labels, layout, None, None, None, 0.0)
  for ours, right in zip(actual[:1] + actual[2:], (expected[0], *expected[2:4]), strict=True):
    error = np.abs(np.asarray(ours, np.float64) - right).max()
    assert error <= 2.0**-8 * np.abs(right).max()


def test_what_is_masked_gives_nothing_and_takes_nothing():
  hidden, head, labels, bias, mask = draw(8, 16, 50, "dv")
  values = run(hidden, head, labels, bias, jnp.zeros(8), head_layout="dv", z_loss=0.1)
  assert all(not np.asarray(value).any() for value in values)
  weights = jnp.linspace(0.0, 2.0, 8)
  actual = run(hidden, head, labels, bias, weights, head_layout="dv", z_loss=0.1)
  expected = oracle(hidden, head, labels, "dv", bias, weights, None, 0.1)
  for ours, right in zip(actual, expected, strict=True):
    assert_close(ours, right, jnp.float32)


def test_says_whether_the_label_was_the_likeliest():
  hidden, head, labels, _, mask = draw(64, 16, 9001, "dv")
  best = np.asarray(hidden @ head).argmax(-1)
  labels = jnp.where(jnp.arange(64) % 2 == 0, best, labels)
  *_, correct = linear_cross_entropy(hidden, head, labels, mask=mask, return_correct=True)
  np.testing.assert_array_equal(correct, np.asarray(mask) & (np.asarray(labels) == best))


def test_a_sharded_head_gives_the_same():
  hidden, head, labels, _, _ = draw(16, 24, 16_384, "dv")
  mesh = jax.make_mesh((2, 2, 2), ("dp", "fsdp", "mp"), axis_types=(AxisType.Auto,) * 3)
  expected = run(hidden, head, labels, None, None, head_layout="dv")
  placed = (
    jax.device_put(hidden, NamedSharding(mesh, PartitionSpec(("dp", "fsdp")))),
    jax.device_put(head, NamedSharding(mesh, PartitionSpec("fsdp", "mp"))),
    jax.device_put(labels, NamedSharding(mesh, PartitionSpec(("dp", "fsdp")))),
  )
  for ours, right in zip(run(*placed, None, None, head_layout="dv"), expected, strict=True):
    assert_close(ours, np.asarray(right, np.float64), jnp.float32)


def test_vmap_and_checkpoint():
  hidden, head, labels, _, _ = draw(12, 16, 50, "dv")
  stacked = hidden.reshape(3, 4, 16), labels.reshape(3, 4)
  losses = jax.vmap(lambda h, y: linear_cross_entropy(h, head, y)[0])(*stacked)
  expected = linear_cross_entropy(hidden, head, labels)[0]
  assert_close(losses.reshape(-1), np.asarray(expected, np.float64), jnp.float32)
  loss = lambda h: jnp.sum(linear_cross_entropy(h, head, labels)[0])  # noqa: E731
  again = jax.grad(jax.checkpoint(loss))(hidden)
  assert_close(again, np.asarray(jax.grad(loss)(hidden), np.float64), jnp.float32)


def test_mistakes_are_explained():
  hidden, head, labels, _, _ = draw(4, 16, 50, "dv")
  with pytest.raises(ValueError, match="head_layout must be 'dv' or 'vd', got 'tied'"):
    linear_cross_entropy(hidden, head, labels, head_layout="tied")
  with pytest.raises(ValueError, match="head of layout 'vd' must have 16 as its D, got"):
    linear_cross_entropy(hidden, head, labels, head_layout="vd")
  with pytest.raises(NotImplementedError, match="'pallas' does not serve linear_cross_entropy"):
    linear_cross_entropy(hidden, head, labels, implementation="pallas")
