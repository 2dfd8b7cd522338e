"""Validation of every implementation of a case against its oracle, before anything is timed."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from benchmarks.cases import Argument, Case
from tests.kernels.tolerances import assert_close


def validate(case: Case) -> dict[str, float]:
  """Checks that results and all gradients are within `tests.kernels.tolerances`.

  Args:
    case: Operation at a size whose oracle fits into memory.

  Returns:
    The largest error of each implementation, relative to the largest value in its array.

  Raises:
    AssertionError: An implementation is wrong; the message names it and its error.
  """
  dtype = case.arguments[0].dtype
  arrays, cotangents = draw(case)
  wide = [jax.tree.map(_wide, tree) for tree in (arrays, cotangents)]
  expected = case.oracle(*wide)
  plain = expected if dtype == jnp.float32 else case.oracle(arrays, cotangents)
  errors = {}
  for implementation in case.implementations:
    with mode_of(implementation):
      results = jax.tree.leaves(with_gradients(case, implementation)(arrays, cotangents))
    errors[implementation] = 0.0
    for i, (actual, right, theirs) in enumerate(zip(results, expected, plain, strict=True)):
      name = f"{implementation}, array {i} of results and gradients"
      assert_close(actual, right, dtype, xla=theirs, name=name)
      errors[implementation] = max(errors[implementation], largest_error(actual, right))
  return errors


def largest_error(actual: Any, expected: Any) -> float:
  """Returns the largest difference, relative to the largest expected value unless that is 0."""
  actual, expected = _wide(actual), _wide(expected)
  return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))


def draw(case: Case, seed: int = 0) -> tuple[list[jax.Array], Any]:
  """Returns random arguments, and cotangents of the results."""
  rng = np.random.default_rng(seed)

  def one(argument):
    if jnp.issubdtype(argument.dtype, jnp.integer):
      return jnp.asarray(rng.integers(0, argument.spread, argument.shape), argument.dtype)
    values = rng.standard_normal(argument.shape, np.float32) * np.float32(argument.spread)
    return jnp.asarray(values, argument.dtype)

  arrays = [one(argument) for argument in case.arguments]
  results = jax.eval_shape(forward(case, "xla"), arrays)
  return arrays, jax.tree.map(lambda x: one(Argument(x.shape, x.dtype)), results)


def forward(case: Case, implementation: str) -> Callable[[list[jax.Array]], Any]:
  """Returns the compiled forward pass: arrays -> results."""
  return jax.jit(lambda arrays: case.function(*arrays, implementation=implementation))


def with_gradients(case: Case, implementation: str) -> Callable[[list[jax.Array], Any], Any]:
  """Returns both passes, compiled: (arrays, cotangents) -> (results, gradients)."""
  count = sum(jnp.issubdtype(a.dtype, jnp.floating) for a in case.arguments)

  def both(arrays, cotangents):
    results, vjp = jax.vjp(
      lambda *x: case.function(*x, *arrays[count:], implementation=implementation),
      *arrays[:count],
    )
    return results, vjp(cotangents)

  return jax.jit(both)


def mode_of(implementation: str) -> contextlib.AbstractContextManager:
  """Returns a context in which kernels are interpreted if there is no TPU."""
  interprets = implementation == "pallas" and jax.default_backend() != "tpu"
  return pltpu.force_tpu_interpret_mode() if interprets else contextlib.nullcontext()


def _wide(x: Any) -> np.ndarray:
  x = np.asarray(x)
  return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64)
