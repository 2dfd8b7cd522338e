"""The public norms: they check their arguments and choose an implementation.

RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba et al., 2016), with or without the residual
addition before them. Statistics and the affine part are computed in float32; outputs have the
input's dtype. For the backward pass only the inputs are kept, or the sum: the statistics are
cheaper to compute again than to read.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ll3m_kernels import dispatch
from ll3m_kernels.norms import backward, forward, xla
from ll3m_kernels.norms.spec import Spec
from ll3m_kernels.sharding import Sharding, map_shards, vary_alike

_OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")


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
  return _run(
    Spec(False, float(epsilon), float(scale_offset)), implementation, sharding, x, scale, None
  )


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
  return _run(Spec(True, float(epsilon), 0.0), implementation, sharding, x, scale, bias)


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
  return _run_add(spec, implementation, sharding, x, residual, scale, None)


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
  return _run_add(spec, implementation, sharding, x, residual, scale, bias)


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


class _Static(NamedTuple):
  """What does not change with the data.

  Attributes:
    implementation: as `dispatch.choose` returns it.
    spec: the options of the call.
    sharding: of the arrays; None on one device.
  """

  implementation: str | None
  spec: Spec
  sharding: Sharding | None

  def run(self, kernel: Callable, plain: Callable, *arrays: Array | None) -> Any:
    """Runs a pass whose first array is [.., D]; its results are like that one, or like weights."""
    function = functools.partial(
      dispatch.run,
      self.implementation,
      functools.partial(kernel, self.spec),
      functools.partial(plain, self.spec),
    )
    if self.sharding is None:
      return function(*arrays)
    rows = self.sharding.rows(arrays[0].ndim)
    specs = [None if a is None else rows if a.ndim > 1 else PartitionSpec() for a in arrays]
    outputs = jax.eval_shape(function, *arrays)
    out_specs = jax.tree.map(lambda x: rows if x.ndim > 1 else PartitionSpec(), outputs)

    def shard(*arrays):
      results = function(*arrays)
      # What is like a weight is a sum over rows.
      return jax.tree.map(
        lambda x: x if x.ndim > 1 else jax.lax.psum(x, self.sharding.batch_axes), results
      )

    return map_shards(shard, self.sharding, tuple(specs), out_specs)(*arrays)


def _static(spec, implementation, sharding, x, scale, bias, adds):
  chosen = dispatch.choose(implementation, _refusal(x, scale, bias, adds))
  if sharding is not None:
    sharding.check_batch("x", x.shape)
    if sharding.mesh.size == 1 or x.ndim < 2:
      sharding = None
  return _Static(chosen, spec, sharding)


def _run(spec, implementation, sharding, x, scale, bias):
  static = _static(spec, implementation, sharding, x, scale, bias, adds=False)
  return _norm(static, *vary_alike(x, scale, bias))


def _run_add(spec, implementation, sharding, x, residual, scale, bias):
  static = _static(spec, implementation, sharding, x, scale, bias, adds=True)
  return _add_norm(static, *vary_alike(x, residual, scale, bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static, x, scale, bias):
  return _norm_forward(static, x, scale, bias)[0]


def _norm_forward(static, x, scale, bias):
  run = functools.partial(static.run, forward.forward, xla.forward)
  return dispatch.first_order(_name(static), run, x, scale, bias), (x, scale, bias)


def _norm_backward(static, residuals, normed_bar):
  return _backward(static, *residuals, normed_bar)


_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(static, x, residual, scale, bias):
  return _add_norm_forward(static, x, residual, scale, bias)[0]


def _add_norm_forward(static, x, residual, scale, bias):
  run = functools.partial(static.run, forward.add_forward, xla.add_forward)
  normed, total = dispatch.first_order(_name(static), run, x, residual, scale, bias)
  return (normed, total), (total, scale, bias)


def _add_norm_backward(static, residuals, cotangents):
  sum_bar, scale_bar, bias_bar = _backward(static, *residuals, *cotangents)
  return sum_bar, sum_bar, scale_bar, bias_bar


_add_norm.defvjp(_add_norm_forward, _add_norm_backward)


def _backward(static, *arrays):
  run = functools.partial(static.run, backward.backward, xla.backward)
  return dispatch.first_order(_name(static), run, *arrays)


def _name(static: _Static) -> str:
  return "layer_norm" if static.spec.is_centred else "rms_norm"


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
