"""The formulas of a norm in float32, shared by both implementations.

Arrays are [.., D] and row statistics [.., 1]. Weights have as many axes and broadcast against
them. `gain` is the scale plus its offset.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Spec(NamedTuple):
  """The static options of a call.

  Attributes:
    is_centred: True for LayerNorm, which subtracts the mean; False for RMSNorm.
    epsilon: Constant added to the mean square.
    scale_offset: Constant added to the scale.
  """

  is_centred: bool
  epsilon: float
  scale_offset: float


class Rows(NamedTuple):
  """The row statistics of the forward pass.

  Attributes:
    rstd: Reciprocal standard deviation, 1 / sqrt(mean((x - mean)^2) + epsilon).
    mean: Rounded mean of x; None (meaning 0) for RMSNorm.
    mean_residual: Correction to `mean`. If a float32 row's mean is 1e4 times its standard
      deviation, one float32 sum is off by 1e-3 standard deviations; summing the centred values once
      more recovers that error. None (meaning 0) for RMSNorm and for narrower dtypes: if the mean of
      such a row is large compared with its standard deviation, the few bits of its values add up in
      float32 without rounding, and the division's rounding error, 1e-7 of the mean, is far less
      than the spacing of the values.
  """

  rstd: Float[Array, "*B 1"]
  mean: Float[Array, "*B 1"] | None
  mean_residual: Float[Array, "*B 1"] | None


class RowBars(NamedTuple):
  """The row statistics of the backward pass; `gradients` subtracts slope * (x - mean) + shift.

  Attributes:
    slope: Coefficient of x - mean.
    shift: Constant per row; None for RMSNorm.
  """

  slope: Float[Array, "*B 1"]
  shift: Float[Array, "*B 1"] | None


def measure(spec: Spec, x: Float[Array, "*B D"], dtype: DTypeLike) -> Rows:
  """Computes the row statistics of x, a float32 copy of an array of dtype `dtype`."""
  if not spec.is_centred:
    return Rows(jax.lax.rsqrt(_mean(x * x) + spec.epsilon), None, None)
  mean = _mean(x)
  centred = x - mean
  if jnp.finfo(dtype).bits < 32:
    return Rows(jax.lax.rsqrt(_mean(centred * centred) + spec.epsilon), mean, None)
  # Neither of these two means depends on the other.
  mean_residual, square = _mean(centred), _mean(centred * centred)
  variance = jnp.maximum(square - mean_residual * mean_residual, 0.0)
  return Rows(jax.lax.rsqrt(variance + spec.epsilon), mean, mean_residual)


def normalise(
  x: Float[Array, "*B D"],
  rows: Rows,
  gain: Float[Array, "*b D"],
  bias: Float[Array, "*b D"] | None,
) -> Float[Array, "*B D"]:
  """Computes (x - mean) * rstd * gain + bias."""
  y = _centre(x, rows) * rows.rstd * gain
  return y if bias is None else y + bias


def measure_bars(
  x: Float[Array, "*B D"], rows: Rows, gain: Float[Array, "*b D"], y_bar: Float[Array, "*B D"]
) -> RowBars:
  """Computes the row statistics of the backward pass.

  No mean depends on `rstd` or `mean_residual`, so a TPU can reduce them together with the
  statistics of the forward pass.
  """
  h = y_bar * gain
  if rows.mean is None:
    product, shift = _mean(h * x), None
  else:
    total, product = _mean(h), _mean(h * (x - rows.mean))
    shift = total * rows.rstd
    if rows.mean_residual is not None:
      product = product - total * rows.mean_residual
  # Multiplied factor by factor: rstd^3 alone would underflow long before the product does.
  return RowBars(product * rows.rstd * rows.rstd * rows.rstd, shift)


def gradients(
  x: Float[Array, "*B D"],
  rows: Rows,
  bars: RowBars,
  gain: Float[Array, "*b D"],
  y_bar: Float[Array, "*B D"],
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Computes the cotangent of x, and the terms whose sum over rows is the cotangent of the scale.

  With c = x - mean, r = rstd and h = y_bar * gain:

    x_bar = r h - c r^3 mean(h c) - r mean(h)        scale_bar = sum of (y_bar r) c

  The last term of x_bar applies to LayerNorm only.
  """
  centred, scaled = _centre(x, rows), y_bar * rows.rstd
  x_bar = scaled * gain - centred * bars.slope
  if bars.shift is not None:
    x_bar = x_bar - bars.shift
  return x_bar, scaled * centred


def _centre(x: Float[Array, "*B D"], rows: Rows) -> Float[Array, "*B D"]:
  for part in (rows.mean, rows.mean_residual):
    if part is not None:
      x = x - part
  return x


def _mean(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
  return jnp.mean(x, axis=-1, keepdims=True)
