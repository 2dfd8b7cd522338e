"""The benchmarks' oracles against jax.nn, complex numbers, and numerical derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import oracles


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (True, 3)])
def test_attention(is_causal, window):
  query, key, value = normal(2, 7, 4, 8), normal(2, 7, 2, 8, seed=1), normal(2, 7, 2, 8, seed=2)
  local = None if window is None else (window - 1, 0)
  with jax.enable_x64(True):
    arrays = [jnp.asarray(x) for x in (query, key, value)]
    actual = oracles.attention(*arrays, is_causal=is_causal, window=window)
    expected = jax.nn.dot_product_attention(*arrays, is_causal=is_causal, local_window_size=local)
  assert actual.dtype == jnp.float64
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)  # jax.nn: float32 softmax


@pytest.mark.parametrize("is_centred", [False, True])
def test_norms(is_centred):
  x, residual, scale, bias = (normal(*shape) for shape in ((3, 9), (3, 9), (9,), (9,)))
  options = {"is_centred": is_centred, "epsilon": 0.1, "scale_offset": 1.0}

  def direct(row, bias=0.0):
    centred = row - row.mean() if is_centred else row
    return centred / np.sqrt(np.mean(centred**2) + 0.1) * (1.0 + scale) + bias

  with jax.enable_x64(True):
    actual = oracles.norm(*map(jnp.asarray, (x, scale, bias)), **options)
    normed, total = oracles.add_norm(
      lambda total, scale: oracles.norm(total, scale, **options),
      jnp.bfloat16,
      *map(jnp.asarray, (x, residual, scale)),
    )
  np.testing.assert_allclose(actual, [direct(row, bias) for row in x], rtol=1e-12)
  rounded = (x + residual).astype(jnp.bfloat16).astype(np.float64)
  np.testing.assert_array_equal(total, rounded)
  np.testing.assert_allclose(normed, [direct(row) for row in rounded], rtol=1e-12)


def test_rotary():
  query, key, positions = normal(1, 5, 2, 8), normal(1, 5, 1, 8), np.array([[0, 1, 9, 4, 4000]])
  with jax.enable_x64(True):
    actual = oracles.rotary(*map(jnp.asarray, (query, key, positions)), theta=100.0, rotary_dim=4)
  for result, x in zip(actual, (query, key), strict=True):
    frequencies = np.array([1.0, 0.1], np.float32).astype(np.float64)
    turned = (x[..., :2] + 1j * x[..., 2:4]) * np.exp(1j * positions[..., None, None] * frequencies)
    expected = np.concatenate([turned.real, turned.imag, x[..., 4:]], axis=-1)
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize("layout", ["dv", "vd"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_cross_entropy(layout, has_bias):
  hidden, head, bias = normal(6, 5), normal(5, 11, seed=1), normal(11, seed=2)
  head = head if layout == "dv" else head.T.copy()
  labels, cotangents = np.array([0, 10, 3, 3, 7, 1]), normal(6, seed=3)
  arrays = [hidden, head, *([bias] if has_bias else []), labels]
  loss, *gradients = oracles.cross_entropy(layout)(arrays, cotangents)

  def direct(hidden, head, *rest):
    *bias, labels = rest
    logits = hidden @ (head if layout == "dv" else head.T) + sum(b[None] for b in bias)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]

  expected = oracles.by_autodiff(direct)(arrays, cotangents)
  for actual, right in zip([loss, *gradients], expected, strict=True):
    np.testing.assert_allclose(actual, right, atol=1e-12)


def test_oracles_by_autodiff_return_values_and_gradients():
  function = oracles.by_autodiff(lambda x, n: (x**3, x * n))
  x, bars = np.array([1.0, 2.0]), (np.array([1.0, 10.0]), np.array([0.5, 0.0]))
  cubes, products, gradient = function([x, np.array([4, 5])], bars)
  np.testing.assert_array_equal(cubes, [1, 8])
  np.testing.assert_array_equal(products, [4, 10])
  np.testing.assert_array_equal(gradient, [3 + 2, 120])
