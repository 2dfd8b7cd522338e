"""The norms against float64 NumPy: values and all gradients, in both implementations."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import ll3m_kernels as kernels
from ll3m_kernels import dispatch
from ll3m_kernels.norms import block_sizes
from tests.kernels import numpy_kernels
from tests.kernels.norms import oracle
from tests.kernels.tolerances import BFLOAT16_ROUNDING, assert_close

OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
EPSILON = 1e-5


def draw(operation, shape, dtype=jnp.float32, weight_dtype=jnp.float32, has_bias=True, seed=0):
  """Returns (x, residual, scale, bias, normed_bar, sum_bar), with None for absent arguments."""
  rng = np.random.default_rng(seed)
  # The rows are far from centred, to reveal a missing or inaccurate mean.
  x, residual, normed_bar, sum_bar = (
    jnp.asarray(rng.normal(offset, size=shape), dtype) for offset in (2.0, 1.0, 0.5, 0.5)
  )
  scale, bias = (jnp.asarray(rng.normal(size=shape[-1:]), weight_dtype) for _ in range(2))
  adds, has_bias = operation.startswith("add_"), has_bias and operation.endswith("layer_norm")
  return (
    x,
    residual if adds else None,
    scale,
    bias if has_bias else None,
    normed_bar,
    sum_bar if adds else None,
  )


def call(operation, x, residual, scale, bias, **options):
  """Calls a norm; returns (normed, sum or None)."""
  function = getattr(kernels, operation)
  weights = (scale,) if bias is None else (scale, bias)
  if residual is None:
    return function(x, *weights, epsilon=EPSILON, **options), None
  return function(x, residual, *weights, epsilon=EPSILON, **options)


def values_and_gradients(operation, arrays, jit=True, **options):
  """Returns the same arrays as `oracle.norm`."""

  def run(x, residual, scale, bias, normed_bar, sum_bar):
    forward = functools.partial(call, operation, **options)
    results, vjp = jax.vjp(forward, x, residual, scale, bias)
    x_bar, residual_bar, scale_bar, bias_bar = vjp((normed_bar, sum_bar))
    return oracle.Normed(*results, x_bar, residual_bar, scale_bar, bias_bar)

  return (jax.jit(run) if jit else run)(*arrays)


def expect(operation, arrays, actual, plain, **options):
  """Compares results with the oracle, within the bounds of both implementations."""
  expected = oracle.norm(operation, *arrays, epsilon=EPSILON, **options)
  x, residual, scale, bias = arrays[:4]
  dtypes = oracle.Normed(x, residual, x, residual, scale, bias)
  for name, ours, right, theirs, like in zip(
    expected._fields, actual, expected, plain, dtypes, strict=True
  ):
    if right is None:
      assert ours is None
      continue
    assert ours.dtype == like.dtype, name
    # The bound is looser if any input is bfloat16.
    dtype = jnp.bfloat16 if jnp.bfloat16 in (x.dtype, like.dtype) else jnp.float32
    assert_close(ours, right, dtype, theirs, f"{operation}: {name}")


@contextlib.contextmanager
def interpreted(generation="v5e", **params):
  """Interprets kernels with uninitialised memory full of NaN; with parameters, as on a TPU."""
  on_tpu = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params))
  with dispatch.target(generation), on_tpu if params else numpy_kernels.interpreted():
    yield


def check(operation, arrays, generation="v5e", params: dict[str, Any] | None = None, **options):
  """Compares both implementations with the oracle."""
  plain = values_and_gradients(operation, arrays, implementation="xla", **options)
  expect(operation, arrays, plain, plain, **options)
  with interpreted(generation, **(params or {})):
    actual = values_and_gradients(operation, arrays, implementation="pallas", **options)
  expect(operation, arrays, actual, plain, **options)


@pytest.fixture
def small_blocks(monkeypatch):
  """Splits small arrays into many blocks of 32 rows, with two tiles of one chunk each."""
  monkeypatch.setattr(block_sizes, "_LEAST_BLOCK_BYTES", 1)
  monkeypatch.setattr(block_sizes, "RULE", block_sizes.RULE._replace(block_bytes=32 * 100 * 2))
  monkeypatch.setattr(block_sizes, "_MOST_ROWS", 16)
  monkeypatch.setattr(block_sizes, "_STEPS", 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_and_gradients(operation, dtype):
  check(operation, draw(operation, (2, 13, 300), dtype))


@pytest.mark.parametrize("shape", [(7,), (1, 128), (3, 1, 576), (2, 2, 2, 8), (40, 257)])
def test_any_shape(shape):
  check("add_rms_norm", draw("add_rms_norm", shape), scale_offset=1.0)


@pytest.mark.parametrize(
  ("dtype", "weight_dtype"), [(jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)]
)
def test_weights_keep_their_own_dtype(dtype, weight_dtype):
  check("layer_norm", draw("layer_norm", (20, 64), dtype, weight_dtype))


def test_a_bias_is_optional():
  for operation in ("layer_norm", "add_layer_norm"):
    check(operation, draw(operation, (20, 64), has_bias=False))


@pytest.mark.parametrize(
  ("rows", "generation"), [(64, "v5e"), (100, "v5e"), (128, "v5p"), (150, "v5p")]
)
def test_many_blocks(small_blocks, rows, generation):
  """The last block is full or partial; on v5p two cores share the blocks, evenly or not."""
  arrays = draw("add_layer_norm", (rows, 100), jnp.bfloat16)
  problem = block_sizes.problem_of(arrays[0], 4, 1, 2)
  chosen = block_sizes.choose_blocks(problem, dispatch.GENERATIONS[generation])
  assert chosen == (32, 16, 16)
  check("add_layer_norm", arrays, generation)


def test_no_races_in_a_shuffled_grid(small_blocks):
  arrays = draw("add_layer_norm", (150, 100), jnp.bfloat16)
  params = {"detect_races": True, "random_seed": 7, "num_cores_or_threads": 2}
  check("add_layer_norm", arrays, "v5p", params)
  pltpu.reset_tpu_interpret_mode_state()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
  operation=st.sampled_from(OPERATIONS),
  leading=st.lists(st.integers(1, 9), max_size=3),
  size=st.integers(8, 400),  # with fewer, cancellation leaves no gradient to compare
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  weight_dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  has_bias=st.booleans(),
)
def test_random_shapes_and_dtypes(operation, leading, size, dtype, weight_dtype, has_bias):
  check(operation, draw(operation, (*leading, size), dtype, weight_dtype, has_bias))


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
def test_the_rounded_sum_is_normalised(implementation):
  x, residual, scale, _, _, _ = draw("add_rms_norm", (33, 96), jnp.bfloat16)

  @jax.jit
  def both(x, residual, scale):
    normed, total = kernels.add_rms_norm(x, residual, scale, implementation=implementation)
    return normed, total

  @jax.jit
  def alone(total, scale):
    return kernels.rms_norm(total, scale, implementation=implementation)

  with interpreted() if implementation == "pallas" else contextlib.nullcontext():
    normed, total = both(x, residual, scale)
    np.testing.assert_array_equal(normed, alone(total, scale))
  exact = np.asarray(x, np.float32) + np.asarray(residual, np.float32)
  np.testing.assert_array_equal(total, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_tiny_and_huge_rows(implementation, factor):
  """Intermediate powers neither overflow nor underflow if the result does not."""
  x, _, scale, _, x_bar, _ = draw("rms_norm", (16, 64))
  arrays = (x * factor, None, scale, None, x_bar * factor, None)
  with interpreted() if implementation == "pallas" else contextlib.nullcontext():
    actual = values_and_gradients("rms_norm", arrays, implementation=implementation)
  expect("rms_norm", arrays, actual, actual)


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("operation", ["layer_norm", "add_layer_norm"])
def test_rows_far_from_zero(operation, mean):
  """The rounding error of the mean exceeds the tolerance; `mean_residual` recovers it."""
  arrays = draw(operation, (16, 300))
  check(operation, (arrays[0] + mean, *arrays[1:]))


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4])
def test_bfloat16_rows_far_from_zero(mean, implementation):
  """The mean is exact enough that only the rounding of the results remains as an error.

  Both implementations compute the same, so neither can be the reference for the other.
  """
  x, *rest = draw("layer_norm", (16, 2560), jnp.bfloat16)
  arrays = (x + jnp.bfloat16(mean), *rest)
  with interpreted() if implementation == "pallas" else contextlib.nullcontext():
    actual = values_and_gradients("layer_norm", arrays, implementation=implementation)
  expected = oracle.norm("layer_norm", *arrays, epsilon=EPSILON)
  for name, ours, right in zip(expected._fields, actual, expected, strict=True):
    if right is not None:
      error = np.abs(np.asarray(ours, np.float64) - right).max()
      assert error <= BFLOAT16_ROUNDING * np.abs(right).max(), name


@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_constant_rows_are_0(dtype, implementation):
  """Their computed variance is 0 or a rounding error of either sign."""
  x = jnp.full((16, 300), 12345.678, dtype)
  with interpreted() if implementation == "pallas" else contextlib.nullcontext():
    normed = kernels.layer_norm(x, jnp.ones(300), implementation=implementation)
  assert np.abs(np.asarray(normed)).max() < 0.1


def test_the_oracle_agrees_with_finite_differences():
  for operation in OPERATIONS:
    *inputs, normed_bar, sum_bar = map(
      lambda x: None if x is None else oracle.wide(x), draw(operation, (3, 5))
    )

    def loss(*inputs, operation=operation, bars=(normed_bar, sum_bar)):
      normed = oracle.norm(operation, *inputs, *bars, epsilon=EPSILON)
      total = 0.0 if bars[1] is None else (normed.total * bars[1]).sum()
      return (normed.normed * bars[0]).sum() + total

    found = oracle.norm(operation, *inputs, normed_bar, sum_bar, epsilon=EPSILON)[2:]
    for index, (array, gradient) in enumerate(zip(inputs, found, strict=True)):
      if array is None:
        continue
      for place in np.ndindex(array.shape):
        sides = []
        for step in (1e-6, -1e-6):
          moved = array.copy()
          moved[place] += step
          sides.append(loss(*inputs[:index], moved, *inputs[index + 1 :]))
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(gradient[place], abs=1e-6)
