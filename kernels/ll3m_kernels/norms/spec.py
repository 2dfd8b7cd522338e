"""What a norm computes, in float32: the formulas of both implementations.

Arrays are [.., D] and what is known of their rows is [.., 1]; weights have as many axes and
broadcast against them. Gain is the scale with its offset.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Spec(NamedTuple):
  """The options of a call that do not change with its data.

  Attributes:
    is_centred: LayerNorm, which subtracts the mean; else RMSNorm.
    epsilon: added to the mean square.
    scale_offset: added to the scale.
  """

  is_centred: bool
  epsilon: float
  scale_offset: float


class Rows(NamedTuple):
  """What the forward pass has to know of each row.

  Attributes:
    inverse: 1 / sqrt(mean((x - mean)^2) + epsilon).
    mean: of x, rounded; None, as if it were 0, for RMSNorm.
    rest: what the mean is more than that. Of float32 rows whose mean is 1e4 times their deviation,
      a sum in float32 has the mean with an error of 1e-3 of the deviation; a second sum, of what is
      left then, has the error. None, as if it were 0, for RMSNorm and for narrower dtypes: where
      the mean is large beside the deviation, their few bits add up in float32 without rounding, and
      that of the division, 1e-7 of the mean, is far less than the distance of two such numbers.
  """

  inverse: Float[Array, "*B 1"]
  mean: Float[Array, "*B 1"] | None
  rest: Float[Array, "*B 1"] | None


class RowBars(NamedTuple):
  """What the backward pass has to know of each row besides: what the statistics take back.

  Attributes:
    slope: of x_bar in x - mean.
    shift: of x_bar; None for RMSNorm.
  """

  slope: Float[Array, "*B 1"]
  shift: Float[Array, "*B 1"] | None


def measure(spec: Spec, x: Float[Array, "*B D"], dtype: DTypeLike) -> Rows:
  """Computes the statistics of x in float32, which had `dtype` before it was widened."""
  if not spec.is_centred:
    return Rows(jax.lax.rsqrt(_mean(x * x) + spec.epsilon), None, None)
  mean = _mean(x)
  centred = x - mean
  if jnp.finfo(dtype).bits < 32:
    return Rows(jax.lax.rsqrt(_mean(centred * centred) + spec.epsilon), mean, None)
  # These two means do not wait for each other.
  rest, square = _mean(centred), _mean(centred * centred)
  variance = jnp.maximum(square - rest * rest, 0.0)
  return Rows(jax.lax.rsqrt(variance + spec.epsilon), mean, rest)


def normalise(
  x: Float[Array, "*B D"],
  rows: Rows,
  gain: Float[Array, "*b D"],
  bias: Float[Array, "*b D"] | None,
) -> Float[Array, "*B D"]:
  """Computes (x - mean) * inverse * gain + bias."""
  y = _centre(x, rows) * rows.inverse * gain
  return y if bias is None else y + bias


def measure_bars(
  x: Float[Array, "*B D"], rows: Rows, gain: Float[Array, "*b D"], y_bar: Float[Array, "*B D"]
) -> RowBars:
  """Computes what `gradients` subtracts.

  No mean waits for the inverse, nor for the mean's rest, so that a TPU can reduce them together
  with the statistics.
  """
  h = y_bar * gain
  if rows.mean is None:
    product, shift = _mean(h * x), None
  else:
    total, product = _mean(h), _mean(h * (x - rows.mean))
    shift = total * rows.inverse
    if rows.rest is not None:
      product = product - total * rows.rest
  # Factor by factor: the inverse to the third alone would underflow long before the product does.
  return RowBars(product * rows.inverse * rows.inverse * rows.inverse, shift)


def gradients(
  x: Float[Array, "*B D"],
  rows: Rows,
  bars: RowBars,
  gain: Float[Array, "*b D"],
  y_bar: Float[Array, "*B D"],
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Computes the cotangent of x, and what summed over the rows is that of the scale.

  With c = x - mean, r the inverse and h = y_bar * gain:

    x_bar = r h - c r^3 mean(h c) - r mean(h)        scale_bar = sum of (y_bar r) c

  the last term of x_bar for LayerNorm only.
  """
  centred, scaled = _centre(x, rows), y_bar * rows.inverse
  x_bar = scaled * gain - centred * bars.slope
  if bars.shift is not None:
    x_bar = x_bar - bars.shift
  return x_bar, scaled * centred


def _centre(x: Float[Array, "*B D"], rows: Rows) -> Float[Array, "*B D"]:
  for part in (rows.mean, rows.rest):
    if part is not None:
      x = x - part
  return x


def _mean(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
  return jnp.mean(x, axis=-1, keepdims=True)
