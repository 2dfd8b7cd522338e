"""Micro-batches that are divided to fit into memory."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from ll3m.data.batch import Batch
from ll3m.training import memory


def make_batch(shape):
  numbers = np.arange(np.prod(shape)).reshape(shape)
  return Batch(*(numbers.astype(t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))


def test_divided_batches_have_the_same_rows_in_the_same_order():
  batch = make_batch((2, 4, 3))
  divided = memory.divide(batch, 2)
  assert divided.inputs.shape == (4, 2, 3)
  for whole, parts in zip(batch, divided, strict=True):
    assert [row.tolist() for step in parts for row in step] == whole.reshape(8, 3).tolist()


def step(state, batch):
  """Needs memory in proportion to the rows of a micro-batch."""

  def micro(total, rows):
    return total + jnp.sin(jnp.outer(rows.ravel(), jnp.arange(50_000.0))).sort().sum(), None

  return jax.lax.scan(micro, state, batch.mask)[0]


def shapes(parts):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), memory.divide(make_batch((1, 8, 4)), parts)
  )


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_largest_micro_batches_that_fit_are_chosen(parts, monkeypatch):
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  jitted = jax.jit(step)
  needed = memory.used_bytes(jitted.lower(scalar, shapes(parts)).compile())
  free = psutil.virtual_memory()._replace(available=int(needed / 0.8) + 1)
  monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
  compiled, chosen = memory.compile_to_fit(jitted, scalar, shapes, fewest=1, most=8)
  assert chosen == parts and memory.used_bytes(compiled) <= needed
  assert memory.compile_to_fit(jitted, scalar, shapes, fewest=1, most=1)[1] == 1
  assert memory.compile_to_fit(jitted, scalar, shapes, fewest=8, most=8)[1] == 8


def test_memory_is_described_with_the_division():
  (device, *_) = jax.devices("cpu")
  total = psutil.virtual_memory().total / 2**30
  assert memory.describe(3 * 2**30, device, rows=8, parts=1) == (
    f"memory      3.0 GiB of {total:.1f} GiB per step"
  )
  assert memory.describe(2**30, device, rows=8, parts=4).endswith("in 4 micro-batches of 2 to fit")
