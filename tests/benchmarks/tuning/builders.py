"""Builders of the kernels that `test_estimates` prices in another process."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ll3m_kernels.dispatch import MIB

M, K, N = 1024, 512, 256


def product(dtype="bfloat16"):
  def kernel(x_ref, y_ref, z_ref):
    z_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

  x, y = jax.ShapeDtypeStruct((M, K), dtype), jax.ShapeDtypeStruct((K, N), dtype)

  def function(x, y):
    return pl.pallas_call(
      kernel,
      grid=(M // 256,),
      in_specs=[
        pl.BlockSpec((256, K), lambda i: (i, 0)),
        pl.BlockSpec((K, N), lambda i: (0, 0)),
      ],
      out_specs=pl.BlockSpec((256, N), lambda i: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
      name="product",
    )(x, y)

  return function, (x, y)


def loop_over_data():
  """Returns a kernel whose number of products depends on data."""

  def kernel(n_ref, x_ref, z_ref):
    x = x_ref[...]
    z_ref[...] = jax.lax.fori_loop(0, n_ref[0, 0], lambda i, z: z + jnp.dot(x, x), x)

  arrays = jax.ShapeDtypeStruct((8, 128), jnp.int32), jax.ShapeDtypeStruct((256, 256), jnp.float32)
  return (lambda n, x: pl.pallas_call(kernel, out_shape=arrays[1])(n, x)), arrays


def in_place():
  """Returns a kernel that overwrites its first operand; v5p's VMEM does not fit a copy of it."""
  array = jax.ShapeDtypeStruct((4096, 512), jnp.float32)

  def kernel(x_ref, *refs):
    refs[-1][...] = x_ref[...] + sum(y_ref[...] for y_ref in refs[:-1])

  def function(*operands):
    block = pl.BlockSpec((1024, 512), lambda i: (i, 0))
    return pl.pallas_call(
      kernel,
      grid=(4,),
      in_specs=[block] * 4,
      out_specs=block,
      out_shape=array,
      input_output_aliases={0: 0},
      compiler_params=pltpu.CompilerParams(vmem_limit_bytes=40 * MIB),
    )(*operands)

  return function, (array,) * 4


def refused():
  raise NotImplementedError("there is no such kernel")
