"""Global batches on the devices, built from each process's rows on the host."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ll3m.core import sharding
from ll3m.data.batch import Batch


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
  """Shards a batch over the mesh.

  Args:
    batch: This process's rows, [b, T] or [A, b, T].
    mesh: Devices.

  Returns:
    Global arrays with the rows of all processes.
  """
  placement = sharding.batch_sharding(mesh, leading=batch.inputs.ndim - 2)
  return jax.tree.map(lambda array: jax.make_array_from_process_local_data(placement, array), batch)


def in_step(batches: Any) -> Iterator[Batch]:
  """Yields batches, and with several processes, padding after the end of the data.

  Processes may run out of data at different batches, but all must take part in every step.

  Args:
    batches: A `BatchIterator` that does not repeat.
  """
  yield from batches
  while jax.process_count() > 1:
    yield batches.padding()


def stack_micro_steps(batches: Iterator[Batch], count: int) -> Batch:
  """Stacks the next `count` batches, the micro-steps of an optimizer step: [A, b, T]."""
  return jax.tree.map(lambda *arrays: np.stack(arrays), *(next(batches) for _ in range(count)))


def batch_shapes(mesh: Mesh, *shape: int) -> Batch:
  """Returns the shapes and shardings of a global batch, [B, T] or [A, B, T], for compilation."""
  placement = sharding.batch_sharding(mesh, leading=len(shape) - 2)
  dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
  return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=placement) for dtype in dtypes))
