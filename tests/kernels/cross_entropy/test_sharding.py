"""The loss on meshes, and inside a caller's own shard_map."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ll3m_kernels import Sharding, linear_cross_entropy
from tests.kernels.cross_entropy.oracle import (
  assert_right,
  draw,
  oracle,
  run,
)
from tests.kernels.tolerances import assert_close

AXES = ("dp", "fsdp", "mp")


def make_mesh(*sizes: int) -> Mesh:
  return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), AXES)


def placed(mesh: Mesh, layout: str):
  """Returns training's shardings of hidden [B, T, D], head, labels [B, T] and bias."""
  rows = PartitionSpec(("dp", "fsdp"))
  head = PartitionSpec(*(("fsdp", "mp") if layout == "dv" else ("mp", "fsdp")))
  return [jax.NamedSharding(mesh, spec) for spec in (rows, head, rows, PartitionSpec("mp"))]


@pytest.mark.parametrize("layout", ["dv", "vd"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (2, 4, 1), (1, 2, 4)])
@pytest.mark.parametrize("with_sharding", [True, False])
def test_any_mesh_gives_the_results_of_one_device(narrow_chunks, sizes, layout, with_sharding):
  case = draw((8, 5), vocabulary=1200, layout=layout, bias=True, mask="float", z_loss=1e-2)
  mesh = make_mesh(*sizes)
  specs = placed(mesh, layout)
  arrays = zip((case.hidden, case.head, case.labels, case.bias), specs, strict=True)
  hidden, head, labels, bias = (jax.device_put(x, spec) for x, spec in arrays)
  sharding = Sharding(mesh, ("dp", "fsdp"), "mp") if with_sharding else None
  actual = run(case._replace(hidden=hidden, head=head, labels=labels, bias=bias), sharding=sharding)
  assert_right(actual, oracle(case))


@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_the_vocabulary_is_split_over_devices(layout):
  """No device multiplies more than its part of a chunk or gathers other parts."""
  mesh = make_mesh(2, 2, 2)
  sharding = Sharding(mesh, ("dp", "fsdp"), "mp")
  hidden, head, labels, _ = placed(mesh, layout)
  tokens, features, vocabulary = 64, 16, 16_384
  grad = jax.jit(
    jax.grad(
      lambda *x: jnp.sum(linear_cross_entropy(*x, head_layout=layout, sharding=sharding)[0]), (0, 1)
    ),
    out_shardings=(hidden, head),
  )
  shape = (features, vocabulary) if layout == "dv" else (vocabulary, features)
  text = grad.lower(
    jax.ShapeDtypeStruct((tokens, features), jnp.float32, sharding=hidden),
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=head),
    jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=labels),
  ).compile().as_text()  # fmt: skip
  assert " dot(" in text
  assert re.search(r"\b2048\b", text), "a device's half of a chunk"
  assert not re.search(r"\b4096\b", text), "a whole chunk on one device"
  assert not re.search(r"\b16384\b", text), "the whole head on one device"


def test_vocabulary_that_does_not_divide_evenly(narrow_chunks):
  case = draw(vocabulary=701)
  sharding = Sharding(make_mesh(1, 1, 2), ("dp", "fsdp"), "mp")
  assert_right(run(case, sharding=sharding), oracle(case))


def test_inside_a_shard_map(narrow_chunks):
  """The caller's map checks varying axes; the head's gradient is summed over devices."""
  case = draw(16, z_loss=1e-2)
  mesh = make_mesh(1, 8, 1)
  rows, whole = PartitionSpec("fsdp"), PartitionSpec()

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(rows, whole, rows, rows, rows), out_specs=(rows, whole)
  )
  def grad(hidden, head, labels, loss_bar, penalty_bar):
    def total(hidden, head):
      loss, penalty = linear_cross_entropy(hidden, head, labels, **case.options)
      return jnp.sum(loss * loss_bar + penalty * penalty_bar)

    return jax.grad(total, (0, 1))(hidden, head)

  hidden_bar, head_bar = jax.jit(grad)(
    case.hidden, case.head, case.labels, case.loss_bar, case.penalty_bar
  )
  expected = oracle(case)
  assert_close(hidden_bar, expected.hidden_bar, jnp.float32)
  assert_close(head_bar, expected.head_bar, jnp.float32)
