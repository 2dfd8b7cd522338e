"""Norms in plain jnp: the implementation "xla", for any platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m_kernels.norms.spec import Spec, gradients, measure, measure_bars, normalise


def forward(
  spec: Spec, x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None
) -> Float[Array, "*B D"]:
  """Normalises x; see `rms_norm` and `layer_norm`."""
  gain = _row(scale, x.ndim) + spec.scale_offset
  wide = _wide(x)
  y = normalise(
    wide, measure(spec, wide, x.dtype), gain, None if bias is None else _row(bias, x.ndim)
  )
  return y.astype(x.dtype)


def add_forward(
  spec: Spec,
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Returns the normalised sum and the sum; see `add_rms_norm`."""
  total = _add(x, residual)
  return forward(spec, total, scale, bias), total


def backward(
  spec: Spec,
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None,
  y_bar: Float[Array, "*B D"],
  sum_bar: Float[Array, "*B D"] | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, " D"], Float[Array, " D"] | None]:
  """Computes the cotangents of x and, in float32, of scale and bias.

  Args:
    spec: Options of the call.
    x: Input of the norm; with a fused addition, the sum.
    scale: Learned scale.
    bias: Learned bias, if any.
    y_bar: Cotangent of the normalised activations.
    sum_bar: Cotangent of the sum, with a fused addition.
  """
  wide, y_bar = _wide(x), _wide(y_bar)
  gain = _row(scale, x.ndim) + spec.scale_offset
  rows = measure(spec, wide, x.dtype)
  x_bar, scale_terms = gradients(wide, rows, measure_bars(wide, rows, gain, y_bar), gain, y_bar)
  if sum_bar is not None:
    x_bar = x_bar + _wide(sum_bar)
  leading = tuple(range(x.ndim - 1))
  bias_bar = None if bias is None else jnp.sum(y_bar, axis=leading)
  return x_bar.astype(x.dtype), jnp.sum(scale_terms, axis=leading), bias_bar


def _add(x: Float[Array, "*B D"], residual: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
  """Adds, and rounds explicitly, because XLA may skip a rounding to bfloat16 when it fuses."""
  if x.dtype.itemsize >= 4:
    return x + residual
  limits = jnp.finfo(x.dtype)
  total = jax.lax.reduce_precision(_wide(x) + _wide(residual), limits.nexp, limits.nmant)
  return total.astype(x.dtype)


def _row(weight: Float[Array, " D"], ndim: int) -> Float[Array, "*b D"]:
  """Returns a weight as float32 [1, .., D]."""
  return _wide(weight).reshape((1,) * (ndim - 1) + weight.shape)


def _wide(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
  return x.astype(jnp.float32)
