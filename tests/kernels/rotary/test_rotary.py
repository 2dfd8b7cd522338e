"""Rotary embeddings against float64 NumPy: both implementations, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks import shapes
from ll3m_kernels import rotary_embedding
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = ("xla", "pallas")


@pytest.fixture(autouse=True)
def interpreted():
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    yield


def oracle(x, positions, theta, rotary_dim, sign=1):
  """Angles in float64, of inverse frequencies that are rounded to float32 as everywhere."""
  x = np.asarray(x, np.float64)
  half = rotary_dim // 2
  frequency = (1.0 / theta ** (np.arange(half) / half)).astype(np.float32).astype(np.float64)
  angle = sign * np.asarray(positions)[..., None, None] * frequency
  cos, sin = np.cos(angle), np.sin(angle)
  first, second = x[..., :half], x[..., half:rotary_dim]
  turned = (first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:])
  return np.concatenate(turned, axis=-1)


def draw(batch, length, heads, size, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.normal(size=(batch, length, n, size)), dtype) for n in heads]
  return *arrays, jnp.asarray(rng.integers(0, 4096, (batch, length)), jnp.int32)


def run(implementation, query, key, positions, **options):
  """Rotated queries and keys, and what the rotation gives back for them as cotangents."""

  def both(query, key):
    rotated, vjp = jax.vjp(
      lambda q, k: rotary_embedding(q, k, positions, implementation=implementation, **options),
      query,
      key,
    )
    return (*rotated, *vjp((query, key)))

  return jax.jit(both)(query, key)


def compare(actual, query, key, positions, dtype, theta, rotary_dim, xla=None):
  for i, (x, sign) in enumerate(((query, 1), (key, 1), (query, -1), (key, -1))):
    expected = oracle(x, positions, theta, rotary_dim, sign)
    assert_close(actual[i], expected, dtype, None if xla is None else xla[i], f"result {i}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("batch", "length", "heads", "size", "rotary_dim"),
  [
    (1, 130, (4, 2), 64, 64),
    (2, 7, (3, 1), 80, 32),
    (1, 1, (2, 2), 8, 2),
    (1, 700, (5, 1), 100, 100),
  ],
)
def test_values_and_gradients(implementation, batch, length, heads, size, rotary_dim):
  arrays = draw(batch, length, heads, size)
  actual = run(implementation, *arrays, theta=1e5, rotary_dim=rotary_dim)
  compare(actual, *arrays, jnp.float32, 1e5, rotary_dim)


@pytest.mark.parametrize("model", shapes.ROTARY)
def test_the_models_shapes(model):
  shape = shapes.ROTARY[model]
  arrays = draw(1, 140, (shape.num_heads, shape.num_kv_heads), shape.head_dim, jnp.bfloat16)
  options = {"theta": 1e4, "rotary_dim": shape.rotary_dim}
  xla = run("xla", *arrays, **options)
  compare(run("pallas", *arrays, **options), *arrays, jnp.bfloat16, *options.values(), xla)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("theta", [1e4, 1e5])
@pytest.mark.parametrize(("limit", "bound"), [(4097, 2e-5), (2**20, 2e-3)])
def test_cos_and_sin_are_exact_at_any_position(implementation, theta, limit, bound):
  """Read off by rotating unit vectors."""
  rng = np.random.default_rng(1)
  positions = np.concatenate([rng.integers(0, limit, 254), [0, limit - 1]])[None].astype(np.int32)
  unit = jnp.zeros((1, 256, 1, 128)).at[..., :64].set(1.0)
  rotated, _ = rotary_embedding(
    unit, unit, jnp.asarray(positions), theta=theta, implementation=implementation
  )
  assert np.abs(np.asarray(rotated) - oracle(unit, positions, theta, 128)).max() < bound


def test_a_second_derivative_is_right():
  """The rotation is linear: its second derivative is zero, and that of its square is not."""
  query, key, positions = draw(1, 3, (2, 1), 8)

  def loss(query):
    return jnp.sum(rotary_embedding(query, key, positions, implementation="xla")[0] ** 2)

  hessian_product = jax.grad(lambda q: jnp.sum(jax.grad(loss)(q) * query))(query)
  assert_close(hessian_product, 2 * np.asarray(query, np.float64), jnp.float32)


def test_mistakes_are_explained():
  query, key, positions = draw(1, 4, (2, 1), 8)
  with pytest.raises(ValueError, match="rotary_dim must be even and within 2..8, got 10"):
    rotary_embedding(query, key, positions, rotary_dim=10)
  with pytest.raises(ValueError, match="theta must be positive and finite, got 0"):
    rotary_embedding(query, key, positions, theta=0.0)
  half = query.astype(jnp.float16)
  with pytest.raises(NotImplementedError, match="query: expected bfloat16 or float32, got float16"):
    rotary_embedding(half, half, positions, implementation="pallas")
