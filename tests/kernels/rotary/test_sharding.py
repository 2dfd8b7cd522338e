"""Rotary embeddings on meshes, and inside a caller's own shard_map."""

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
def test_inside_a_callers_shard_map(interpreted, implementation, check_vma):
  """Batch and heads are split; a single KV head stays shared."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "mp"))
  (query, key, *_), positions = draw(4, 10, (4, 1), 8)
  mapped = in_shard_map(mesh, implementation, check_vma)
  for ours, whole in zip(jax.jit(mapped)(query, key, positions), (query, key), strict=True):
    assert_close(ours, oracle(whole, positions), jnp.float32)


def test_the_kernel_lowers_under_check_vma():
  """jax's kernel interpreter does not support check_vma, but lowering for a TPU does."""
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
    ("pallas", (1, 2, 4), (8, 2)),  # the key heads are not split
    ("pallas", (2, 2, 2), (9, 3)),  # no heads are split
  ],
)
def test_any_mesh_gives_the_results_of_one_device(interpreted, implementation, sizes, heads):
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
