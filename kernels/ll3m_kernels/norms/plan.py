"""The plan of a norm's call: its checked arguments and its implementation."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ll3m_kernels import dispatch
from ll3m_kernels.norms import backward, forward
from ll3m_kernels.norms.spec import Spec
from ll3m_kernels.norms.vjp import Static, rows_spec
from ll3m_kernels.sharding import check_sharding, laid_out_for, own_part
from ll3m_kernels.validation import finite_number, floating


class Plan(NamedTuple):
  """The plan of a call, shared by the call and its explanation.

  Attributes:
    static: Static arguments of the operation.
    arrays: Arrays of the operation: x, the residual if it is added, scale and bias.
    text: Description in words.
  """

  static: Static
  arrays: tuple[Any, ...]
  text: str


def make_plan(
  operation: str,
  *,
  x: Any,
  scale: Any,
  epsilon: Any,
  residual: Any = None,
  bias: Any = None,
  scale_offset: Any = 0.0,
  implementation: Any,
  sharding: Any,
) -> Plan:
  """Checks the arguments of a norm and chooses its implementation; see `rms_norm` for arguments.

  Raises:
    ValueError: A shape, dtype or option is invalid.
    NotImplementedError: The named implementation does not support an argument.
  """
  adds, is_centred = operation.startswith("add_"), operation.endswith("layer_norm")
  x, scale = floating("x", x), floating("scale", scale)
  bias = None if bias is None else floating("bias", bias)
  if not x.shape:
    raise ValueError("x must have at least one dimension, got shape ()")
  for name, weight in (("scale", scale), ("bias", bias)):
    if weight is not None and weight.shape != x.shape[-1:]:
      raise ValueError(f"{name} must have shape {x.shape[-1:]}, got {weight.shape}")
  if adds:
    residual = floating("residual", residual)
    if x.shape != residual.shape or x.dtype != residual.dtype:
      raise ValueError(
        f"x and residual must have the same shape and dtype, got {x.shape} {x.dtype} and "
        f"{residual.shape} {residual.dtype}"
      )
  spec = Spec(
    is_centred,
    finite_number("epsilon", epsilon, above=0),
    finite_number("scale_offset", scale_offset),
  )
  check_sharding(sharding)
  rows = rows_spec(sharding, len(x.shape))
  if rows != PartitionSpec():
    sharding.check_batch("x", x.shape)
  own = own_part(sharding, x, rows)
  with laid_out_for(sharding):
    refusal = _refusal(x, scale, bias, own, adds)
    chosen = dispatch.choose(implementation, refusal)
    kernels = {} if refusal else _kernels(own, bias, adds)
    text = dispatch.describe(operation, implementation, refusal, kernels)
  arrays = (x, residual, scale, bias) if adds else (x, scale, bias)
  return Plan(Static(operation, spec, chosen, sharding), arrays, text)


def _refusal(x: Any, scale: Any, bias: Any, own: Any, adds: bool) -> str | None:
  """Returns why the kernel does not support these arrays, if so; `own` is one device's shard."""
  for name, array in (("x", x), ("scale", scale), ("bias", bias)):
    if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name}: expected bfloat16 or float32, got {array.dtype}"
  if 0 in x.shape:
    return f"x: expected at least one element, got shape {x.shape}"
  generation = dispatch.generation()
  needed = max(kernel.blocks_of(own, bias, adds)[1] for kernel in (forward, backward))
  if needed > generation.vmem_bytes:
    return (
      f"x: rows of {x.shape[-1]} elements need {needed / dispatch.MIB:.1f} MiB of vector memory, "
      f"but a {generation.name} core has {generation.vmem_bytes / dispatch.MIB:.0f} MiB"
    )
  return None


def _kernels(own: Any, bias: Any, adds: bool) -> dict[str, tuple[str, int]]:
  """Returns the layout of each pass in words, and its VMEM; see `dispatch.describe`."""
  found = {}
  for name, kernel in (("forward", forward), ("backward", backward)):
    blocks, needed = kernel.blocks_of(own, bias, adds)
    found[name] = f"blocks of {blocks.rows} rows, {blocks.tile} at a time", needed
  return found
