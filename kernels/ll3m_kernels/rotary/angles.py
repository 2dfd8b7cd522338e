"""Angles of rotary embeddings that are exact at any position (Su et al., 2021).

Angles are counted in turns rather than radians, so whole turns drop out without rounding. A
frequency is split into a multiple of 2**-32 turns and a remainder. Position times multiple is an
int32 product that wraps around once per turn; position times remainder adds little more than a
rounding error. A float32 product of position and frequency would be off by 3e-2 radians at
position one million.

Dimensions: R rotated dimensions of a head, in R/2 pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.polynomial import Chebyshev, Polynomial


class Rotation(NamedTuple):
  """The static options of a rotation.

  Attributes:
    theta: Base of the frequencies.
    rotary_dim: Number of rotated dimensions, R.
    scaling_factor: Divisor of the frequencies.
    inverse_frequencies: Radians per position of each pair, instead of those of theta and the
      scaling factor.
    magnitude: Factor of cos and sin.
    is_backward: Whether to rotate backwards, as for cotangents.
  """

  theta: float
  rotary_dim: int
  scaling_factor: float = 1.0
  inverse_frequencies: tuple[float, ...] | None = None
  magnitude: float = 1.0
  is_backward: bool = False

  def transpose(self) -> "Rotation":
    """Returns the transpose of this operation: the opposite rotation of the same magnitude."""
    return self._replace(is_backward=not self.is_backward)


def frequencies(rotation: Rotation) -> tuple[np.ndarray, np.ndarray]:
  """Returns turns per position: multiples of 2**-32, int32 [R/2], and remainders, float32 [R/2].

  The inverse frequencies theta**(-2i/R) are rounded to float32, and again when they are divided by
  the scaling factor, as in every published implementation.
  """
  if rotation.inverse_frequencies is not None:
    radians = np.array(rotation.inverse_frequencies, np.float32)
  else:
    exponent = np.arange(0, rotation.rotary_dim, 2) / rotation.rotary_dim
    radians = (1.0 / rotation.theta**exponent).astype(np.float32) / np.float32(
      rotation.scaling_factor
    )
  turns = radians.astype(np.float64) / (2 * np.pi)
  turns -= np.floor(turns)  # whole turns per position (theta < 1) have no effect
  whole = np.rint(turns * 2.0**32)
  rest = turns - whole * 2.0**-32
  return whole.astype(np.int64).astype(np.int32), rest.astype(np.float32)


def cos_sin(
  rotation: Rotation,
  positions: Int[Array, "*#A"],
  whole: Int[Array, "*#A"],
  rest: Float[Array, "*#A"],
) -> tuple[Float[Array, "*A"], Float[Array, "*A"]]:
  """Returns cos and sin of positions * frequencies, times the magnitude, in float32.

  The sine is negative if the rotation is backward.

  Args:
    rotation: Options of the call.
    positions: Int32 positions, which broadcast against the frequencies.
    whole: First result of `frequencies`.
    rest: Second result of `frequencies`.
  """
  turns = (positions * whole).astype(jnp.float32) * 2.0**-32
  turns += positions.astype(jnp.float32) * rest
  square = turns * turns
  cos, sin = _horner(_COS, square), turns * _horner(_SIN, square)
  if rotation.magnitude != 1:
    cos, sin = cos * rotation.magnitude, sin * rotation.magnitude
  return cos, -sin if rotation.is_backward else sin


def _interpolate(function: Callable[[np.ndarray], np.ndarray], degree: int) -> list[float]:
  """Returns coefficients in x**2, lowest first, of an even function for |x| up to half a turn.

  Interpolation at Chebyshev nodes is almost minimax. With degree 6 it is off by 1e-8 (cos) and
  2e-9 (sin), so float32 rounding dominates the total error of 5e-7. At 0 the cosine is exactly 1.
  """
  series = Chebyshev.interpolate(lambda y: function(np.sqrt(y)), degree, domain=[0, 0.25])
  return [float(c) for c in series.convert(kind=Polynomial).coef.astype(np.float32)]


# Polynomials, so that the kernel and plain jnp do the same arithmetic on every platform.
_COS = _interpolate(lambda x: np.cos(2 * np.pi * x), 6)
_SIN = _interpolate(lambda x: 2 * np.pi * np.sinc(2 * x), 6)  # sin(2 pi x) / x


def _horner(coefficients: list[float], x: Array) -> Array:
  value = coefficients[-1]
  for coefficient in reversed(coefficients[:-1]):
    value = value * x + coefficient
  return value
