"""NumPy's interpreter of kernels notices what the interpreters of jax notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels import numpy_kernels


def call(kernel, x, out_blocks=None, **options):
  """Runs a kernel on blocks of four of the six elements of an array."""
  with numpy_kernels.interpreted():
    found = pl.pallas_call(
      kernel,
      grid=(2,),
      in_specs=[pl.BlockSpec((4,), lambda i: (i,))],
      out_specs=pl.BlockSpec((4,), out_blocks or (lambda i: (i,))),
      out_shape=jax.ShapeDtypeStruct((6,), x.dtype),
      **options,
    )(x)
  return np.asarray(found)


def test_blocks_and_conditions():
  def kernel(x_ref, y_ref):
    @pl.when(pl.program_id(0) == 0)
    def _():
      y_ref[...] = x_ref[...]

    @pl.when(pl.program_id(0) == 1)
    def _():
      y_ref[...] = -x_ref[...]

  np.testing.assert_array_equal(call(kernel, jnp.arange(6.0)), [0, 1, 2, 3, -4, -5])


def test_memory_that_is_outside_of_arrays_or_not_written_holds_nan():
  def reversed_block(x_ref, y_ref):
    for i in range(4):
      y_ref[i] = x_ref[3 - i]

  def with_scratch(x_ref, y_ref, scratch_ref):
    y_ref[...] = x_ref[...] + scratch_ref[...]

  def first_step_only(x_ref, y_ref):
    pl.when(pl.program_id(0) == 0)(lambda: y_ref.__setitem__(..., x_ref[...]))

  x = jnp.arange(6.0)
  np.testing.assert_array_equal(call(reversed_block, x), [3, 2, 1, 0, np.nan, np.nan])
  scratch = [pltpu.VMEM((4,), jnp.float32)]
  assert np.isnan(call(with_scratch, x, scratch_shapes=scratch)).all()
  np.testing.assert_array_equal(call(first_step_only, x), [0, 1, 2, 3, np.nan, np.nan])
  # A block that the grid stays at keeps its values.
  np.testing.assert_array_equal(
    call(first_step_only, x, lambda i: (0,)), [0, 1, 2, 3, np.nan, np.nan]
  )


@pytest.mark.parametrize("start", [1, 2])
def test_bad_indices_are_errors(start):
  """1 is no multiple of 2, and a slice of three from 2 on exceeds a block of four."""

  def kernel(x_ref, y_ref):
    begin = pl.multiple_of(pl.program_id(0) * 0 + start, 2)
    y_ref[...] = jnp.zeros(4)
    y_ref[pl.ds(begin, 3)] = x_ref[pl.ds(begin, 3)]

  with pytest.raises(jax.errors.JaxRuntimeError, match="AssertionError"):
    call(kernel, jnp.arange(6.0))
