"""How exact a kernel must be, by dtype: one place for all of them."""

from typing import Any

import numpy as np

# Of the largest expected value.
FLOAT32 = 2e-5
# In bfloat16, against the error that plain jnp makes on the same inputs, plus one rounding.
BFLOAT16_OF_XLA = 1.5
BFLOAT16_ROUNDING = 2.0**-8
# And whatever plain jnp makes, which is held to it too. The most seen is 0.0084, with queries that
# are 16 times as large as elsewhere, and 0.0059 otherwise.
BFLOAT16_MOST = 2.0**-6


def assert_close(
  actual: Any, expected_f64: np.ndarray, dtype: Any, xla: Any = None, name: str = ""
) -> None:
  """Holds a result against a float64 oracle.

  Args:
    actual: what the implementation gave.
    expected_f64: what is right.
    dtype: of the inputs, float32 or bfloat16.
    xla: what plain jnp gave for the same inputs; needed for bfloat16.
    name: what to call it in the message.
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
