"""The public norms: they check their arguments and choose an implementation.

RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba et al., 2016), with or without the residual
addition before them. Statistics and the affine part are computed in float32; outputs have the
input's dtype.
"""

import inspect
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m_kernels import dispatch
from ll3m_kernels.norms import backward, forward
from ll3m_kernels.norms.operation import Static, add_norm, norm
from ll3m_kernels.norms.spec import Spec
from ll3m_kernels.sharding import Sharding, vary_alike


def rms_norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> Float[Array, "*B D"]:
  """Normalises by the root mean square: x / sqrt(mean(x^2) + epsilon) * (scale_offset + scale).

  Args:
    x: the activations.
    scale: the weight.
    epsilon: added to the mean square.
    scale_offset: added to the weight in float32; 1.0 for Gemma, whose weights are stored less 1.
    implementation: see `dispatch.resolve`. The kernel serves bfloat16 and float32.
    sharding: how x lies on a mesh: its first dimension may be split, weights may not.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: the named implementation cannot serve an argument, or this is
      differentiated twice.
  """
  _check(x, scale, None)
  spec = Spec(False, float(epsilon), float(scale_offset))
  static = _static(spec, implementation, sharding, x, scale, None, adds=False)
  return norm(static, *vary_alike(x, scale, None))


def layer_norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None = None,
  *,
  epsilon: float = 1e-5,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> Float[Array, "*B D"]:
  """Normalises to mean 0 and variance 1: (x - mean) / sqrt(var + epsilon) * scale + bias.

  Args:
    x: the activations.
    scale: the weight.
    bias: added last, if given.
    epsilon: added to the (biased) variance.
    implementation: see `dispatch.resolve`. The kernel serves bfloat16 and float32.
    sharding: how x lies on a mesh: its first dimension may be split, weights may not.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: the named implementation cannot serve an argument, or this is
      differentiated twice.
  """
  _check(x, scale, bias)
  spec = Spec(True, float(epsilon), 0.0)
  static = _static(spec, implementation, sharding, x, scale, bias, adds=False)
  return norm(static, *vary_alike(x, scale, bias))


def add_rms_norm(
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Adds a block's output to the residual stream and normalises the sum (see `rms_norm`).

  Args:
    x: the block's output.
    residual: the residual stream, of x's dtype.
    scale: as in `rms_norm`, like all that follow.
    epsilon: as there.
    scale_offset: as there.
    implementation: as there.
    sharding: as there.

  Returns:
    (normed, sum): the normalised sum, and the sum rounded to x's dtype, which is also what is
    normalised.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: as in `rms_norm`.
  """
  _check(x, scale, None)
  _check_residual(x, residual)
  spec = Spec(False, float(epsilon), float(scale_offset))
  static = _static(spec, implementation, sharding, x, scale, None, adds=True)
  return add_norm(static, *vary_alike(x, residual, scale, None))


def add_layer_norm(
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None = None,
  *,
  epsilon: float = 1e-5,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Adds a block's output to the residual stream and normalises the sum (see `layer_norm`).

  Args:
    x: the block's output.
    residual: the residual stream, of x's dtype.
    scale: as in `layer_norm`, like all that follow.
    bias: as there.
    epsilon: as there.
    implementation: as there.
    sharding: as there.

  Returns:
    (normed, sum): the normalised sum, and the sum rounded to x's dtype, which is also what is
    normalised.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: as in `layer_norm`.
  """
  _check(x, scale, bias)
  _check_residual(x, residual)
  spec = Spec(True, float(epsilon), 0.0)
  static = _static(spec, implementation, sharding, x, scale, bias, adds=True)
  return add_norm(static, *vary_alike(x, residual, scale, bias))


def explain(
  operation: str, x: Any, *arrays: Any, implementation: str | None = None, **options: Any
) -> str:
  """Says what a norm would run for these arguments.

  Args:
    operation: the function's name, such as "add_rms_norm".
    x: its first argument: an array, or anything with a shape and a dtype; so are the others.
    *arrays: the others that it takes, in its order.
    implementation: as in the function.
    **options: its other keyword arguments.

  Raises:
    ValueError: unknown name, or shapes or dtypes that do not fit.
    NotImplementedError: the named implementation cannot serve an argument.
  """
  if operation not in _OPERATIONS:
    raise ValueError(f"operation must be one of {', '.join(_OPERATIONS)}, got {operation!r}")
  given = inspect.signature(_OPERATIONS[operation]).bind(x, *arrays, **options).arguments
  scale, bias, adds = given["scale"], given.get("bias"), "residual" in given
  _check(x, scale, bias)
  if adds:
    _check_residual(x, given["residual"])
  refusal = _refusal(x, scale, bias, adds)
  kernels = {}
  if refusal is None:
    for name, kernel in (("forward", forward), ("backward", backward)):
      blocks, needed = kernel.blocks_of(x, bias, adds)
      kernels[name] = f"blocks of {blocks.rows} rows, {blocks.tile} at a time", needed
  return dispatch.describe(operation, implementation, refusal, kernels)


_OPERATIONS = {
  function.__name__: function for function in (rms_norm, layer_norm, add_rms_norm, add_layer_norm)
}


def _static(spec, implementation, sharding, x, scale, bias, adds):
  chosen = dispatch.choose(implementation, _refusal(x, scale, bias, adds))
  if sharding is not None and sharding.mesh.size == 1:
    sharding = None
  if sharding is not None and x.ndim > 1:
    sharding.check_batch("x", x.shape)
  return Static(spec, chosen, sharding)


def _refusal(x: Any, scale: Any, bias: Any, adds: bool) -> str | None:
  """Says why the kernel cannot serve these arrays, if so."""
  for name, array in (("x", x), ("scale", scale), ("bias", bias)):
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name}: expected bfloat16 or float32, got {array.dtype}"
  if 0 in x.shape:
    return f"x: it is empty, {x.shape}"
  generation = dispatch.generation()
  needed = max(kernel.blocks_of(x, bias, adds)[1] for kernel in (forward, backward))
  if needed > generation.vmem_bytes:
    return (
      f"x: rows of {x.shape[-1]} elements need {needed / dispatch.MIB:.1f} MiB of vector memory, "
      f"a core of a {generation.name} has {generation.vmem_bytes / dispatch.MIB:.0f} MiB"
    )
  return None


def _check(x: Any, scale: Any, bias: Any) -> None:
  if len(x.shape) < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be a floating array with a last axis, got {x.shape} {x.dtype}")
  for name, weight in (("scale", scale), ("bias", bias)):
    if weight is None:
      continue
    if weight.shape != x.shape[-1:] or not jnp.issubdtype(weight.dtype, jnp.floating):
      raise ValueError(
        f"{name} must be floating with shape {x.shape[-1:]}, got {weight.shape} {weight.dtype}"
      )


def _check_residual(x: Any, residual: Any) -> None:
  if x.shape != residual.shape or x.dtype != residual.dtype:
    raise ValueError(
      f"x and residual must have one shape and dtype, got {x.shape} {x.dtype} and "
      f"{residual.shape} {residual.dtype}"
    )
