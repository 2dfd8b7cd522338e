"""The backward pass of the norms on a TPU: one kernel for all gradients.

The statistics are recomputed from the input of the norm; nothing else is saved. Each row is read
once and its gradient written once. The gradients of scale and bias are summed over the rows in
float32. Each core accumulates an [8, D] array of its own, whose row i is the sum of the core's rows
i, i + 8, ... XLA sums the remaining [8 * cores, D] and fuses that sum with its consumer.
"""

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
from ll3m_kernels.norms.spec import Spec, gradients, measure, measure_bars
from ll3m_kernels.sharding import result


def backward(
  spec: Spec,
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None,
  y_bar: Float[Array, "*B D"],
  sum_bar: Float[Array, "*B D"] | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, " D"], Float[Array, " D"] | None]:
  """Computes the cotangents of x and, in float32, of scale and bias; see `xla.backward`."""
  shape = x.shape
  arrays = [array.reshape(-1, shape[-1]) for array in (x, y_bar, sum_bar) if array is not None]
  num_rows, size = arrays[0].shape
  blocks, needed = blocks_of(arrays[0], bias, sum_bar is not None)
  num_blocks = pl.cdiv(num_rows, blocks.rows)
  generation = dispatch.generation()
  cores = min(generation.num_cores, num_blocks)
  steps = pl.cdiv(num_blocks, cores)

  def place(core, step):
    index = core * steps + step
    # A core with fewer blocks repeats the last one, which changes nothing.
    return (jnp.minimum(index, num_blocks - 1) if num_blocks % cores else index), 0

  block = pl.BlockSpec((blocks.rows, size), place)
  own_sums = pl.BlockSpec((SUBLANES, size), lambda core, step: (core, 0))
  num_sums = 1 if bias is None else 2
  x_bar, *sums = pl.pallas_call(
    functools.partial(
      _kernel, spec, blocks, num_rows, steps, cores, sum_bar is not None, bias is not None
    ),
    grid=(cores, steps),
    in_specs=[block] * len(arrays) + [pl.BlockSpec((1, size), lambda core, step: (0, 0))],
    out_specs=[block] + [own_sums] * num_sums,
    out_shape=[result((num_rows, size), x.dtype, x)]
    + [result((cores * SUBLANES, size), jnp.float32, x)] * num_sums,
    scratch_shapes=[pltpu.VMEM((SUBLANES, size), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(needed, generation),
    ),
    name="norm_backward",
  )(*arrays, scale[None])
  scale_bar, *bias_bar = [jnp.sum(part, axis=0) for part in sums]
  return x_bar.reshape(shape), scale_bar, (bias_bar[0] if bias_bar else None)


def blocks_of(x: Any, bias: Any, adds: bool) -> tuple[sizes.Blocks, int]:
  """Returns the blocks of x in the backward pass, and the pass's VMEM in bytes."""
  problem = sizes.problem_of(x, 4 if adds else 3, 1, 1 if bias is None else 2)
  blocks = sizes.choose_blocks(problem, dispatch.generation())
  return blocks, sizes.vmem_bytes(problem, blocks)


def _kernel(spec, blocks, num_rows, steps, cores, adds, has_bias, *refs):
  refs = iter(refs)
  x_ref, y_bar_ref = next(refs), next(refs)
  sum_bar_ref = next(refs) if adds else None
  scale_ref, x_bar_ref = next(refs), next(refs)
  sum_refs = [next(refs) for _ in range(1 + has_bias)]
  gain_ref = next(refs)
  row_chunks.spread(scale_ref, gain_ref, spec.scale_offset)
  step = pl.program_id(1)
  left = num_rows - (pl.program_id(0) * steps + step) * blocks.rows
  is_ragged = num_rows != cores * steps * blocks.rows

  @pl.when(step == 0)
  def _():
    for ref in sum_refs:
      ref[...] = jnp.zeros_like(ref)

  def do(rows):
    x, y_bar = row_chunks.read(x_ref, rows), row_chunks.read(y_bar_ref, rows)
    found = measure(spec, x, x_ref.dtype)
    bars = measure_bars(x, found, row_chunks.weight(gain_ref), y_bar)
    for part in row_chunks.columns(x_ref.shape[1]):
      x, y_bar = row_chunks.read(x_ref, rows, part), row_chunks.read(y_bar_ref, rows, part)
      x_bar, scale_terms = gradients(x, found, bars, row_chunks.weight(gain_ref, part), y_bar)
      if adds:
        x_bar = x_bar + row_chunks.read(sum_bar_ref, rows, part)
      row_chunks.write(x_bar_ref, rows, part, x_bar)
      for ref, terms in zip(sum_refs, (scale_terms, y_bar), strict=False):
        if is_ragged:
          # Rows beyond the end have arbitrary values, possibly NaN.
          terms = jnp.where(row_chunks.exist(terms, rows, left), terms, 0.0)
        ref[:, part] += jnp.sum(terms, axis=0)

  row_chunks.for_each_chunk(blocks, do)
