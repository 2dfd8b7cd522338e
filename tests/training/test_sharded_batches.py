"""Batches on the devices: padding, stacking and sharding."""

import itertools

import jax
import numpy as np
import pytest

from ll3m.core import sharding
from ll3m.data.batch import Batch
from ll3m.training import sharded_batches


def batch(value, rows=8, length=3):
  return Batch(*(np.full((rows, length), value, np.int32) for _ in Batch._fields))


class Ends:
  """Iterator of two batches, followed by padding."""

  def __iter__(self):
    return iter([batch(1), batch(2)])

  def padding(self):
    return batch(0)


@pytest.mark.parametrize(("processes", "expected"), [(1, [1, 2]), (2, [1, 2, 0, 0])])
def test_processes_stay_in_step_at_the_end_of_the_data(monkeypatch, processes, expected):
  """A process whose stream ends first yields padding, or the others would wait for it."""
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  taken = itertools.islice(sharded_batches.in_step(Ends()), 4)
  assert [b.inputs[0, 0] for b in taken] == expected


def test_micro_steps_are_stacked_and_rows_sharded_over_the_mesh():
  mesh = sharding.make_mesh("2,2,2")
  rows = Batch(*(np.arange(24, dtype=np.int32).reshape(8, 3) for _ in Batch._fields))
  stacked = sharded_batches.stack_micro_steps(iter([rows, batch(5)]), 2)
  placed = sharded_batches.to_devices(stacked, mesh)
  np.testing.assert_array_equal(placed.inputs, stacked.inputs)
  assert {s.data.shape for s in placed.inputs.addressable_shards} == {(2, 2, 3)}
  shapes = sharded_batches.batch_shapes(mesh, 2, 8, 3)
  assert shapes.inputs.sharding == placed.inputs.sharding
  assert shapes.mask.dtype == np.float32
