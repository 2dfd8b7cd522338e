"""Norms as differentiable operations, in either implementation, on one device or on a mesh.

Only the inputs (or the sum) are saved for the backward pass, because recomputing the statistics is
cheaper than reading them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ll3m_kernels import dispatch
from ll3m_kernels.norms import backward, forward, xla
from ll3m_kernels.norms.spec import Spec
from ll3m_kernels.sharding import Sharding, map_shards


class Static(NamedTuple):
  """The static arguments of a norm.

  Attributes:
    operation: Name of the public function.
    spec: Options of the call.
    implementation: Result of `dispatch.choose`.
    sharding: Sharding of the activations; None on one device.
  """

  operation: str
  spec: Spec
  implementation: str | None
  sharding: Sharding | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm(static: Static, x: Array, scale: Array, bias: Array | None) -> Array:
  """Returns the normalised activations, [.., D]; see `rms_norm`."""
  return _norm_forward(static, x, scale, bias)[0]


def _norm_forward(static, x, scale, bias):
  rows, whole = _specs(static, x)
  run = _mapped(static, forward.forward, xla.forward, (rows, whole, whole), rows)
  return run(x, scale, bias), (x, scale, bias)


def _norm_backward(static, residuals, y_bar):
  return _backward(static, *residuals, y_bar, None)


# In a vmap, an output that is not batched has one cotangent, not one per element of the batch.
norm.defvjp(_norm_forward, _norm_backward, generic_batching=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_norm(
  static: Static, x: Array, residual: Array, scale: Array, bias: Array | None
) -> tuple[Array, Array]:
  """Returns the normalised sum and the sum, [.., D]; see `add_rms_norm`."""
  return _add_norm_forward(static, x, residual, scale, bias)[0]


def _add_norm_forward(static, x, residual, scale, bias):
  rows, whole = _specs(static, x)
  specs = (rows, rows, whole, whole)
  run = _mapped(static, forward.add_forward, xla.add_forward, specs, (rows, rows))
  normed, total = run(x, residual, scale, bias)
  return (normed, total), (total, scale, bias)


def _add_norm_backward(static, residuals, cotangents):
  sum_bar, scale_bar, bias_bar = _backward(static, *residuals, *cotangents)
  return sum_bar, sum_bar, scale_bar, bias_bar


add_norm.defvjp(_add_norm_forward, _add_norm_backward, generic_batching=True)


def _backward(static, x, scale, bias, y_bar, sum_bar):
  rows, whole = _specs(static, x)

  def add_up(x_bar, *sums):
    # The gradients of weights are summed over the rows of all devices.
    return x_bar, *jax.lax.psum(sums, static.sharding.batch_axes)

  run = _mapped(
    static,
    backward.backward,
    xla.backward,
    (rows, whole, whole, rows, rows),
    (rows, whole, whole),
    finish=add_up if rows else None,
  )
  x_bar, scale_sum, bias_sum = run(x, scale, bias, y_bar, sum_bar)
  bias_bar = None if bias is None else bias_sum.astype(bias.dtype)
  return x_bar, scale_sum.astype(scale.dtype), bias_bar


def rows_spec(sharding: Sharding | None, ndim: int) -> PartitionSpec:
  """Returns the partition spec of activations with `ndim` dimensions; unsplit on one device."""
  is_split = sharding is not None and sharding.mesh.size > 1 and ndim > 1
  return sharding.rows(ndim) if is_split else PartitionSpec()


def _specs(static: Static, x: Array) -> tuple[PartitionSpec, PartitionSpec]:
  """Returns the partition specs of x and of the weights, which are replicated."""
  return rows_spec(static.sharding, x.ndim), PartitionSpec()


def _mapped(
  static: Static,
  pallas: Callable[..., Any],
  xla: Callable[..., Any],
  in_specs: Any,
  out_specs: Any,
  finish: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
  """Returns one pass as a function of arrays, mapped over shards; see `map_shards`."""

  def run(*arrays):
    results = dispatch.run(
      static.implementation,
      functools.partial(pallas, static.spec),
      functools.partial(xla, static.spec),
      *arrays,
    )
    return results if finish is None else finish(*results)

  mapped = map_shards(run, static.sharding, in_specs, out_specs)
  return functools.partial(dispatch.first_order, static.operation, mapped)
