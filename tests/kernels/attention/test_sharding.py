"""Attention on meshes of eight devices, compared with one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ll3m_kernels import Sharding, flash_attention
from tests.kernels.tolerances import assert_close


def make_sharding(*sizes):
  mesh = jax.make_mesh(sizes, ("dp", "fsdp", "mp"), axis_types=(AxisType.Auto,) * 3)
  return Sharding(mesh)


def values_and_grads(arrays, ids, sharding):
  def loss(query, key, value):
    output, log_sum_exp = flash_attention(
      query, key, value, is_causal=True, segment_ids=ids, return_residual=True, sharding=sharding
    )
    return jnp.sum(output**2) + jnp.sum(jnp.sin(log_sum_exp)), (output, log_sum_exp)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize(
  ("sizes", "heads"),
  [
    ((2, 2, 2), (4, 2)),  # query and KV heads are split
    ((1, 1, 8), (8, 8)),
    ((2, 1, 4), (8, 2)),  # two devices share a KV head
    ((1, 2, 4), (4, 1)),  # all devices share the KV head
    ((2, 2, 2), (9, 3)),  # 2 does not divide the heads: they are not split
    ((1, 2, 4), (12, 6)),
    ((8, 1, 1), (2, 1)),
  ],
)
def test_any_mesh_gives_the_results_of_one_device(sizes, heads):
  rng = np.random.default_rng(0)
  shapes = [(8, 12, n, 8) for n in (heads[0], heads[1], heads[1])]
  arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
  ids = jnp.asarray(np.sort(rng.integers(0, 3, (8, 12)), axis=1))
  expected = values_and_grads(arrays, ids, None)
  actual = values_and_grads(arrays, ids, make_sharding(*sizes))
  for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


def test_invalid_shardings_are_refused():
  sharding = make_sharding(2, 2, 2)
  x = jnp.zeros((6, 4, 2, 8))
  with pytest.raises(ValueError, match=r"must be a multiple of dp x fsdp = 4, got \[6, 4, 2, 8\]"):
    flash_attention(x, x, x, sharding=sharding)
  with pytest.raises(ValueError, match=r"the mesh has the axes \('dp', 'fsdp', 'mp'\), got tp"):
    Sharding(sharding.mesh, head_axis="tp")


def test_export_to_tpu_contains_the_kernels():
  """GSPMD cannot partition a kernel; the error appears only when lowering for a TPU."""
  sharding = make_sharding(2, 2, 2)
  placed = jax.NamedSharding(sharding.mesh, sharding.rows(4))
  x = jax.ShapeDtypeStruct((8, 256, 4, 64), jnp.bfloat16, sharding=placed)

  def exported(sharding):
    function = functools.partial(flash_attention, is_causal=True, sharding=sharding)
    grad = jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), argnums=(0, 1, 2))
    return jax.export.export(jax.jit(grad), platforms=["tpu"])(x, x, x).mlir_module()

  text = exported(sharding)
  assert text.count("tpu_custom_call") == 2
  assert "all_gather" not in text
  with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
    exported(None)
