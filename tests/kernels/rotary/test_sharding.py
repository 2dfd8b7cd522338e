"""Rotary embeddings on meshes, and inside of a caller's own shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ll3m_kernels import rotary_embedding
from tests.kernels.rotary.oracle import (
  draw,
  loss,
  oracle,
  sharding_of,
)
from tests.kernels.tolerances import assert_close


@pytest.mark.parametrize(
  ("implementation", "check_vma"), [("xla", True), ("xla", False), ("pallas", False)]
)
def test_in_a_shard_map_of_the_caller(interpreted, implementation, check_vma):
  """Batch and heads are split; a single KV head is shared, and stays so."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "mp"))
  (query, key, *_), positions = draw(4, 10, (4, 1), 8)
  mapped = in_shard_map(mesh, implementation, check_vma)
  for ours, whole in zip(jax.jit(mapped)(query, key, positions), (query, key), strict=True):
    assert_close(ours, oracle(whole, positions), jnp.float32)


def test_the_kernel_lowers_under_check_vma():
  """jax's interpreter of kernels does not run there, but lowering for a TPU does."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "mp"))
  (query, key, *_), positions = draw(4, 130, (4, 1), 8)
  mapped = in_shard_map(mesh, None, check_vma=True)
  grad = jax.grad(lambda *x: sum(jnp.sum(y**2) for y in mapped(*x)), argnums=(0, 1))
  exported = jax.export.export(jax.jit(grad), platforms=["tpu"])(query, key, positions)
  assert exported.mlir_module().count("tpu_custom_call") == 2


def in_shard_map(mesh, implementation, check_vma):
  rows, heads = PartitionSpec("dp"), PartitionSpec("dp", None, "mp")
  return jax.shard_map(
    functools.partial(rotary_embedding, implementation=implementation),
    mesh=mesh,
    in_specs=(heads, rows, rows),
    out_specs=(heads, rows),
    check_vma=check_vma,
  )


@pytest.mark.parametrize(
  ("implementation", "sizes", "heads"),
  [
    ("xla", (2, 2, 2), (4, 2)),
    ("pallas", (2, 2, 2), (4, 2)),
    ("pallas", (1, 2, 4), (8, 2)),  # the key heads stay whole
    ("pallas", (2, 2, 2), (9, 3)),  # all do
  ],
)
def test_any_mesh_gives_what_one_device_gives(interpreted, implementation, sizes, heads):
  (query, key, *_), positions = draw(4, 10, heads, 8)
  function = jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1))
  expected = function(query, key, positions)
  actual = jax.jit(functools.partial(function, sharding=sharding_of(*sizes)))(query, key, positions)
  for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


def test_a_batch_that_cannot_be_split_is_explained():
  (query, key, *_), positions = draw(3, 10, (2, 2), 8)
  with pytest.raises(ValueError, match="must be a multiple of dp x fsdp = 4, got"):
    rotary_embedding(query, key, positions, sharding=sharding_of(2, 2, 2))
