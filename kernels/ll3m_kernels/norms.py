"""RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba et al., 2016), with the residual addition.

Statistics and the affine part are computed in float32; outputs have the input's dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m_kernels import dispatch


def rms_norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: str | None = None,
) -> Float[Array, "*B D"]:
  """Normalises by the root mean square: x / sqrt(mean(x^2) + epsilon) * (scale_offset + scale).

  Args:
    x: the activations.
    scale: the weight.
    epsilon: added to the mean square.
    scale_offset: added to the weight in float32; 1.0 for Gemma, whose weights are stored less 1.
    implementation: see `dispatch.resolve`.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes that do not fit.
  """
  _check(x, scale=scale)
  dispatch.resolve(implementation)
  return _rms_norm(x, scale, epsilon, scale_offset)


def layer_norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None = None,
  *,
  epsilon: float = 1e-5,
  implementation: str | None = None,
) -> Float[Array, "*B D"]:
  """Normalises to mean 0 and variance 1: (x - mean) / sqrt(var + epsilon) * scale + bias.

  Args:
    x: the activations.
    scale: the weight.
    bias: added last, if given.
    epsilon: added to the (biased) variance.
    implementation: see `dispatch.resolve`.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes that do not fit.
  """
  _check(x, scale=scale, bias=bias)
  dispatch.resolve(implementation)
  return _layer_norm(x, scale, bias, epsilon)


def add_rms_norm(
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: str | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Adds a block's output to the residual stream and normalises the sum (see `rms_norm`).

  Returns:
    (normed, sum): the normalised sum, and the sum rounded to x's dtype, which is also what is
    normalised.

  Raises:
    ValueError: shapes that do not fit.
  """
  total = _add(x, residual)
  normed = rms_norm(
    total, scale, epsilon=epsilon, scale_offset=scale_offset, implementation=implementation
  )
  return normed, total


def add_layer_norm(
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None = None,
  *,
  epsilon: float = 1e-5,
  implementation: str | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Adds a block's output to the residual stream and normalises the sum (see `layer_norm`).

  Returns:
    (normed, sum): the normalised sum, and the sum rounded to x's dtype, which is also what is
    normalised.

  Raises:
    ValueError: shapes that do not fit.
  """
  total = _add(x, residual)
  return layer_norm(total, scale, bias, epsilon=epsilon, implementation=implementation), total


# For the backward pass only the inputs are kept: the rest is cheaper to compute again than to read.
@functools.partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def _rms_norm(x: Array, scale: Array, epsilon: float, scale_offset: float) -> Array:
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
  return (wide * inverse * (_row(scale, x.ndim) + scale_offset)).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def _layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
  wide = x.astype(jnp.float32)
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
  out = centred * inverse * _row(scale, x.ndim)
  if bias is not None:
    out = out + _row(bias, x.ndim)
  return out.astype(x.dtype)


def _row(weight: Array, ndim: int) -> Array:
  """Returns a weight as float32 [1, .., D]."""
  return weight.astype(jnp.float32).reshape((1,) * (ndim - 1) + weight.shape)


def _add(x: Array, residual: Array) -> Array:
  if x.shape != residual.shape or x.dtype != residual.dtype:
    raise ValueError(
      f"x and residual must have one shape and dtype, got {x.shape} {x.dtype} and "
      f"{residual.shape} {residual.dtype}"
    )
  return x + residual


def _check(x: Array, **weights: Array | None) -> None:
  if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be a floating array with a last axis, got {x.shape} {x.dtype}")
  for name, weight in weights.items():
    if weight is not None and weight.shape != x.shape[-1:]:
      raise ValueError(f"{name} must have shape {x.shape[-1:]}, got {weight.shape}")
