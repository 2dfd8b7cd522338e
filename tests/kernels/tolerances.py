"""The tolerances of all kernels, by dtype."""

from typing import Any

import numpy as np

# Relative to the largest expected value.
FLOAT32 = 2e-5
# In bfloat16: relative to the error of plain jnp on the same inputs, plus one rounding.
BFLOAT16_OF_XLA = 1.5
BFLOAT16_ROUNDING = 2.0**-8
# The absolute limit, also for plain jnp. The largest error observed is 0.0084 with queries that are
# 16 times as large as elsewhere, and 0.0059 otherwise.
BFLOAT16_MOST = 2.0**-6


def assert_close(
  actual: Any, expected_f64: np.ndarray, dtype: Any, xla: Any = None, name: str = ""
) -> None:
  """Compares a result with a float64 oracle.

  Args:
    actual: Result of the implementation.
    expected_f64: Expected result.
    dtype: Dtype of the inputs, float32 or bfloat16.
    xla: Result of plain jnp for the same inputs; required for bfloat16.
    name: Name of the result in error messages.
  """
  expected = np.asarray(expected_f64, np.float64)
  actual = np.asarray(actual, np.float64)
  assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
  assert np.isfinite(actual).all(), f"{name}: not finite"
  if not expected.size:
    return
  largest = np.abs(expected).max()
  error = np.abs(actual - expected).max()
  if np.dtype(dtype) == np.float32:
    bound = FLOAT32 * largest
  else:
    theirs = np.abs(np.asarray(xla, np.float64) - expected).max()
    relative = BFLOAT16_OF_XLA * theirs + BFLOAT16_ROUNDING * largest
    bound = min(relative, BFLOAT16_MOST * largest)
  assert error <= bound, f"{name}: largest error {error:.3g}, allowed {bound:.3g} of {largest:.3g}"
