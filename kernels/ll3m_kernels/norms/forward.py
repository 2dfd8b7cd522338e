"""The forward pass of the norms on a TPU: each row is read once and its result written once."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ll3m_kernels import dispatch
from ll3m_kernels.block_arithmetic import SUBLANES, vmem_limit
from ll3m_kernels.norms import block_sizes as sizes
from ll3m_kernels.norms import row_chunks
from ll3m_kernels.norms.spec import Spec, measure, normalise
from ll3m_kernels.sharding import result


def forward(
  spec: Spec, x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None
) -> Float[Array, "*B D"]:
  """Normalises x; see `rms_norm` and `layer_norm`."""
  return _call(spec, (x,), scale, bias)[0]


def add_forward(
  spec: Spec,
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Returns the normalised sum and the sum; see `add_rms_norm`."""
  normed, total = _call(spec, (x, residual), scale, bias)
  return normed, total


def blocks_of(x: Any, bias: Any, adds: bool) -> tuple[sizes.Blocks, int]:
  """Returns the blocks of x in the forward pass, and the pass's VMEM in bytes."""
  problem = sizes.problem_of(x, 4 if adds else 2, 1 if bias is None else 2, 0)
  blocks = sizes.choose_blocks(problem, dispatch.generation())
  return blocks, sizes.vmem_bytes(problem, blocks)


def _call(spec, arrays, scale, bias):
  shape, dtype = arrays[0].shape, arrays[0].dtype
  arrays = [array.reshape(-1, shape[-1]) for array in arrays]
  num_rows, size = arrays[0].shape
  weights = [weight[None] for weight in (scale, bias) if weight is not None]
  blocks, needed = blocks_of(arrays[0], bias, len(arrays) == 2)
  block = pl.BlockSpec((blocks.rows, size), lambda i: (i, 0))
  outputs = pl.pallas_call(
    functools.partial(_kernel, spec, blocks, len(arrays) == 2, bias is not None),
    grid=(pl.cdiv(num_rows, blocks.rows),),
    in_specs=[block] * len(arrays) + [pl.BlockSpec((1, size), lambda i: (0, 0))] * len(weights),
    out_specs=[block] * len(arrays),
    out_shape=[result((num_rows, size), dtype, arrays[0])] * len(arrays),
    scratch_shapes=[pltpu.VMEM((SUBLANES, size), jnp.float32)] * len(weights),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",),
      vmem_limit_bytes=vmem_limit(needed, dispatch.generation()),
    ),
    name="norm_forward",
  )(*arrays, *weights)
  return [output.reshape(shape) for output in outputs]


def _kernel(spec, blocks, adds, has_bias, *refs):
  refs = iter(refs)
  x_ref = next(refs)
  residual_ref = next(refs) if adds else None
  weight_refs = [next(refs) for _ in range(1 + has_bias)]
  y_ref = next(refs)
  sum_ref = next(refs) if adds else None
  gain_ref, bias_ref = next(refs), next(refs, None)
  row_chunks.spread(weight_refs[0], gain_ref, spec.scale_offset)
  if has_bias:
    row_chunks.spread(weight_refs[1], bias_ref)

  def do(rows):
    if adds:
      # The rounded sum is normalised, because the backward pass recomputes statistics from it.
      total = row_chunks.read(x_ref, rows) + row_chunks.read(residual_ref, rows)
      row_chunks.write(sum_ref, rows, row_chunks.ALL, total)
    source_ref = sum_ref if adds else x_ref
    found = measure(spec, row_chunks.read(source_ref, rows), x_ref.dtype)
    for part in row_chunks.columns(x_ref.shape[1]):
      bias = row_chunks.weight(bias_ref, part) if has_bias else None
      x = row_chunks.read(source_ref, rows, part)
      row_chunks.write(
        y_ref, rows, part, normalise(x, found, row_chunks.weight(gain_ref, part), bias)
      )

  row_chunks.for_each_chunk(blocks, do)
