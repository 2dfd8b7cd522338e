"""The public norms: they check their arguments and choose an implementation.

RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba et al., 2016), with or without the residual
addition before them. Statistics and the affine part are computed in float32; outputs have the
input's dtype. For the backward pass only the inputs are kept, or the sum: the statistics are
cheaper to compute again than to read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m_kernels import dispatch
from ll3m_kernels.norms import backward, forward, xla
from ll3m_kernels.norms.spec import Spec

_OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")


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
    implementation: see `dispatch.resolve`. The kernel serves bfloat16 and float32.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: the named implementation cannot serve an argument, or this is
      differentiated twice.
  """
  _check(x, scale, None)
  return _run(Spec(False, float(epsilon), float(scale_offset)), implementation, x, scale, None)


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
    implementation: see `dispatch.resolve`. The kernel serves bfloat16 and float32.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: the named implementation cannot serve an argument, or this is
      differentiated twice.
  """
  _check(x, scale, bias)
  return _run(Spec(True, float(epsilon), 0.0), implementation, x, scale, bias)


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

  Args:
    x: the block's output.
    residual: the residual stream, of x's dtype.
    scale: as in `rms_norm`, like all that follow.
    epsilon: as there.
    scale_offset: as there.
    implementation: as there.

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
  return _run_add(spec, implementation, x, residual, scale, None)


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

  Args:
    x: the block's output.
    residual: the residual stream, of x's dtype.
    scale: as in `layer_norm`, like all that follow.
    bias: as there.
    epsilon: as there.
    implementation: as there.

  Returns:
    (normed, sum): the normalised sum, and the sum rounded to x's dtype, which is also what is
    normalised.

  Raises:
    ValueError: shapes or dtypes that do not fit.
    NotImplementedError: as in `layer_norm`.
  """
  _check(x, scale, bias)
  _check_residual(x, residual)
  return _run_add(Spec(True, float(epsilon), 0.0), implementation, x, residual, scale, bias)


def explain(
  operation: str,
  x: Any,
  scale: Any,
  bias: Any = None,
  *,
  implementation: str | None = None,
  **_: Any,
) -> str:
  """Says what a norm would run for these arguments.

  Args:
    operation: the function's name, such as "add_rms_norm".
    x: an array, or anything with a shape and a dtype; so are the others.
    scale: as in the function.
    bias: as in the function.
    implementation: as in the function.

  Raises:
    ValueError: unknown name, or shapes or dtypes that do not fit.
    NotImplementedError: the named implementation cannot serve an argument.
  """
  if operation not in _OPERATIONS:
    raise ValueError(f"operation must be one of {', '.join(_OPERATIONS)}, got {operation!r}")
  _check(x, scale, bias)
  adds = operation.startswith("add_")
  refusal = _refusal(x, scale, bias, adds)
  kernels = {}
  if refusal is None:
    for name, kernel in (("forward", forward), ("backward", backward)):
      blocks, needed = kernel.blocks_of(x, bias, adds)
      kernels[name] = f"blocks of {blocks.rows} rows, {blocks.tile} at a time", needed
  return dispatch.describe(operation, implementation, refusal, kernels)


def _run(spec, implementation, x, scale, bias):
  chosen = dispatch.choose(implementation, _refusal(x, scale, bias, adds=False))
  return _norm((chosen, spec), *_vary_alike(x, scale, bias))


def _run_add(spec, implementation, x, residual, scale, bias):
  chosen = dispatch.choose(implementation, _refusal(x, scale, bias, adds=True))
  return _add_norm((chosen, spec), *_vary_alike(x, residual, scale, bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static, x, scale, bias):
  return _norm_forward(static, x, scale, bias)[0]


def _norm_forward(static, x, scale, bias):
  implementation, spec = static
  normed = dispatch.run(
    implementation,
    functools.partial(forward.forward, spec),
    functools.partial(xla.forward, spec),
    x,
    scale,
    bias,
  )
  return normed, (x, scale, bias)


def _norm_backward(static, residuals, normed_bar):
  return _backward(static, *residuals, normed_bar)


_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(static, x, residual, scale, bias):
  return _add_norm_forward(static, x, residual, scale, bias)[0]


def _add_norm_forward(static, x, residual, scale, bias):
  implementation, spec = static
  normed, total = dispatch.run(
    implementation,
    functools.partial(forward.add_forward, spec),
    functools.partial(xla.add_forward, spec),
    x,
    residual,
    scale,
    bias,
  )
  return (normed, total), (total, scale, bias)


def _add_norm_backward(static, residuals, cotangents):
  sum_bar, scale_bar, bias_bar = _backward(static, *residuals, *cotangents)
  return sum_bar, sum_bar, scale_bar, bias_bar


_add_norm.defvjp(_add_norm_forward, _add_norm_backward)


def _backward(static, *args):
  implementation, spec = static
  return dispatch.first_order(
    "layer_norm" if spec.is_centred else "rms_norm",
    functools.partial(
      dispatch.run,
      implementation,
      functools.partial(backward.backward, spec),
      functools.partial(xla.backward, spec),
    ),
    *args,
  )


def _vary_alike(*arrays: Array | None) -> list[Array | None]:
  """Makes all arrays vary over the mesh axes that any does, under `shard_map(check_vma=True)`.

  A weight that all devices share then gets the sum of their gradients.
  """
  varying = frozenset().union(*(jax.typeof(a).mat.varying for a in arrays if a is not None))

  def cast(array):
    if array is None:
      return None
    missing = tuple(varying - jax.typeof(array).mat.varying)
    return jax.lax.pcast(array, missing, to="varying") if missing else array

  return [cast(array) for array in arrays]


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


def _check_residual(x: Array, residual: Array) -> None:
  if x.shape != residual.shape or x.dtype != residual.dtype:
    raise ValueError(
      f"x and residual must have one shape and dtype, got {x.shape} {x.dtype} and "
      f"{residual.shape} {residual.dtype}"
    )
