"""The TPU that a call is laid out for, on meshes and under targets."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import ll3m_kernels as kernels
from ll3m_kernels import dispatch
from ll3m_kernels.sharding import laid_out_for, map_shards

AXES = ("dp", "fsdp", "mp")
V4 = AbstractDevice("TPU v4", 2, "tpu")
TOO_WIDE = 2**16  # rows of this many elements fit a v5e but not a v4


def mesh_here(axis_type=AxisType.Auto):
  return jax.make_mesh((2, 2, 2), AXES, axis_types=(axis_type,) * 3)


def mesh_of(device, sizes=(2, 2, 2)):
  return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


def norm(rows, size, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((rows, size), dtype), jax.ShapeDtypeStruct((size,), dtype)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1)])
def test_the_mesh_of_the_sharding_decides(sizes):
  sharding = kernels.Sharding(mesh_of(V4, sizes))
  assert "laid out for v4" in kernels.explain("rms_norm", *norm(64, 128), sharding=sharding)
  seen = []

  def function(x):
    seen.append(dispatch.generation().name)
    return x

  mapped = map_shards(function, sharding, sharding.rows(2), sharding.rows(2))
  jax.eval_shape(mapped, jax.ShapeDtypeStruct((8, 4), jnp.float32))
  with laid_out_for(sharding):
    seen.append(dispatch.generation().name)
  with kernels.target("v6e"), laid_out_for(sharding):
    seen.append(dispatch.generation().name)
  assert set(seen) == {"v4"}


def test_rows_that_do_not_fit_the_mesh_raise():
  sharding = kernels.Sharding(mesh_of(V4))
  arrays = norm(64, TOO_WIDE)
  assert "laid out for v5e" in kernels.explain("rms_norm", *arrays)
  text = kernels.explain("rms_norm", *arrays, sharding=sharding)
  assert "rms_norm: xla, on every platform" in text and "v4 core has 16 MiB" in text

  def call(implementation):
    def function(x, scale):
      return kernels.rms_norm(x, scale, implementation=implementation, sharding=sharding)

    return jax.eval_shape(function, *arrays)

  assert call(None).shape == arrays[0].shape
  with pytest.raises(NotImplementedError, match="x: rows of .* v4 core has 16 MiB"):
    call("pallas")
  v3 = kernels.Sharding(mesh_of(AbstractDevice("TPU v3", 1, "tpu")))
  assert "no kernels for TPU v3" in kernels.explain("rms_norm", *norm(64, 128), sharding=v3)


def test_the_target_applies_on_a_mesh_of_other_devices():
  """It also applies inside the map, whose mesh consists of CPUs."""
  sharding = kernels.Sharding(mesh_here())
  seen = []

  def function(x):
    seen.append(dispatch.generation().name)
    return x

  mapped = map_shards(function, sharding, sharding.rows(2), sharding.rows(2))
  with kernels.target("v4"):
    mapped(jnp.ones((8, 4)))
    text = kernels.explain("rms_norm", *norm(64, 128), sharding=sharding)
  assert set(seen) == {"v4"} and "laid out for v4" in text


@pytest.mark.parametrize("target_first", [True, False])
@pytest.mark.parametrize("jit", [True, False])
def test_target_and_set_mesh_in_either_order(target_first, jit):
  mesh = mesh_here()
  sharding = kernels.Sharding(mesh)
  x, scale = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32), jnp.ones(16)

  def loss(x, sharding=None):
    return jnp.sum(jnp.sin(kernels.rms_norm(x, scale, sharding=sharding)))

  expected = jax.grad(loss)(x)
  grad = jax.grad(lambda x: loss(x, sharding))
  contexts = [lambda: kernels.target("v4"), lambda: jax.set_mesh(mesh)]
  with contextlib.ExitStack() as stack:
    for context in contexts if target_first else contexts[::-1]:
      stack.enter_context(context())
    assert dispatch.generation().name == "v4"
    actual = jax.jit(grad)(x) if jit else grad(x)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  assert dispatch.generation().name == "v5e"


def test_a_mesh_of_tpus_takes_precedence_over_the_target():
  with jax.sharding.use_abstract_mesh(mesh_of(V4)), kernels.target("v6e"):
    assert dispatch.generation().name == "v4"


def test_explanations_describe_the_shard_of_one_device():
  x = jax.ShapeDtypeStruct((128, 4096), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((4096,), jnp.bfloat16)
  sharding = kernels.Sharding(mesh_here(), ("dp", "fsdp", "mp"), None)
  # 128 rows are 16 rows on each of eight devices.
  own = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
  whole, part = (kernels.explain("rms_norm", y, scale) for y in (x, own))
  assert whole != part == kernels.explain("rms_norm", x, scale, sharding=sharding)


def test_explicit_axes():
  """Norms support them if arrays have the sharding's layout; the loss raises an error."""
  mesh = mesh_here(AxisType.Explicit)
  sharding = kernels.Sharding(mesh)
  with jax.set_mesh(mesh):
    x = jax.device_put(jnp.ones((8, 16)), jax.NamedSharding(mesh, sharding.rows(2)))
    assert kernels.rms_norm(x, jnp.ones(16), sharding=sharding).shape == (8, 16)
    with pytest.raises(NotImplementedError, match="sharding: the axes of its mesh must be Auto"):
      kernels.linear_cross_entropy(
        x, jnp.ones((16, 32)), jnp.zeros(8, jnp.int32), sharding=sharding
      )
