"""The soft cap and its slope, against float64."""

import jax
import jax.numpy as jnp
import numpy as np

from ll3m_kernels.soft_cap import soft_cap


def test_values_and_slopes():
  """The slope is accurate everywhere, even where 1 - tanh^2 cancels."""
  x = jnp.asarray(np.linspace(-120, 120, 2401), jnp.float32)
  capped, slope = jax.jit(lambda x: soft_cap(x, 5.0))(x)
  wide = np.asarray(x, np.float64) / 5
  np.testing.assert_allclose(capped, 5 * np.tanh(wide), rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(slope, np.cosh(wide) ** -2.0, rtol=1e-5)


def test_infinities():
  capped, slope = soft_cap(jnp.array([-jnp.inf, jnp.inf, jnp.finfo(jnp.float32).max]), 30.0)
  np.testing.assert_array_equal(capped, [-30, 30, 30])
  np.testing.assert_array_equal(slope, [0, 0, 0])
