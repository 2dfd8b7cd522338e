"""Detection of control flow that depends on data rather than on the grid alone."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tuning.data_dependence import follows_data, kernel_calls

X = jax.ShapeDtypeStruct((16, 128), jnp.int32)


def call_of(kernel, **options):
  def function(x):
    return pl.pallas_call(kernel, out_shape=X, **options)(x)

  (call,) = kernel_calls(jax.make_jaxpr(jax.jit(function))(X).jaxpr)
  return call


def by_place(x_ref, y_ref):
  @pl.when(pl.program_id(0) == 0)
  def _():
    y_ref[...] = x_ref[...]


def by_value(x_ref, y_ref):
  @pl.when(x_ref[0, 0] > 0)
  def _():
    y_ref[...] = x_ref[...]


def loop_over_places(x_ref, y_ref):
  y_ref[...] = jax.lax.fori_loop(0, pl.program_id(0) + 2, lambda i, y: y + i, x_ref[...])


def loop_over_values(x_ref, y_ref):
  y_ref[...] = jax.lax.fori_loop(0, x_ref[0, 0], lambda i, y: y + i, x_ref[...])


def loop_until_value(x_ref, y_ref):
  y_ref[...] = jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y + 1, x_ref[...])


def value_found_in_a_loop(x_ref, y_ref):
  """The second loop's bound is a constant until the first loop has run."""
  count = jax.lax.fori_loop(0, 2, lambda i, n: n + x_ref[i, 0], 0)
  y_ref[...] = jax.lax.fori_loop(0, count, lambda i, y: y + i, x_ref[...])


def value_in_a_branch(x_ref, y_ref):
  def inner():
    return jax.lax.cond(x_ref[0, 0] > 0, lambda: x_ref[...], lambda: -x_ref[...])

  y_ref[...] = jax.lax.cond(pl.program_id(0) == 0, inner, lambda: x_ref[...])


def values_that_decide_nothing(x_ref, y_ref):
  x = x_ref[...]
  y = jax.lax.fori_loop(0, 3, lambda i, y: jnp.where(y > 0, y + x, y), x)
  y_ref[...] = jax.lax.cond(pl.program_id(0) == 0, lambda y: y, lambda y: -y, y)


@pytest.mark.parametrize(
  "kernel", [by_place, loop_over_places, values_that_decide_nothing], ids=lambda f: f.__name__
)
def test_kernels_that_depend_on_the_grid_alone(kernel):
  assert not follows_data(call_of(kernel, grid=(2,)))


@pytest.mark.parametrize(
  "kernel",
  [by_value, loop_over_values, loop_until_value, value_found_in_a_loop, value_in_a_branch],
  ids=lambda f: f.__name__,
)
def test_kernels_that_depend_on_data(kernel):
  assert follows_data(call_of(kernel, grid=(2,)))


def test_index_maps_that_read_tables_depend_on_data():
  spec = pl.BlockSpec((8, 128), lambda i, table: (table[i], 0))

  def function(table, x):
    return pl.pallas_call(
      lambda table_ref, x_ref, y_ref: by_place(x_ref, y_ref),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(2,), in_specs=[spec], out_specs=spec
      ),
      out_shape=X,
    )(table, x)

  table = jax.ShapeDtypeStruct((2,), jnp.int32)
  (call,) = kernel_calls(jax.make_jaxpr(function)(table, X).jaxpr)
  assert follows_data(call)


def test_calls_are_found_inside_custom_derivatives():
  @jax.custom_vjp
  def function(x):
    return pl.pallas_call(by_place, out_shape=X, grid=(2,))(x)

  function.defvjp(lambda x: (function(x), None), lambda _, bar: (bar,))
  assert len(list(kernel_calls(jax.make_jaxpr(function)(X).jaxpr))) == 1
