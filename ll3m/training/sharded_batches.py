"""From a process's rows on the host to a global batch on the devices."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ll3m.core import sharding
from ll3m.data.batch import Batch


def to_devices(batch: Batch, mesh: Mesh) -> Batch:
  """Spreads a batch over the mesh.

  Args:
    batch: this process's rows, [b, T] or [A, b, T].
    mesh: the devices.

  Returns:
    The same with all processes' rows, as global arrays.
  """
  placement = sharding.batch_sharding(mesh, leading=batch.inputs.ndim - 2)
  return jax.tree.map(lambda array: jax.make_array_from_process_local_data(placement, array), batch)


def in_step(batches: Any) -> Iterator[Batch]:
  """Goes on with padding after the end of the data, if there are several processes.

  Their streams may end at different batches, and every process has to take part in every step.

  Args:
    batches: a `BatchIterator` that does not repeat.
  """
  yield from batches
  while jax.process_count() > 1:
    yield batches.padding()


def stack_micro_steps(batches: Iterator[Batch], count: int) -> Batch:
  """Joins the next micro-steps of an optimizer step: [A, b, T]."""
  return jax.tree.map(lambda *arrays: np.stack(arrays), *(next(batches) for _ in range(count)))


def batch_shapes(mesh: Mesh, *shape: int) -> Batch:
  """Returns the shapes and shardings of a global batch, [B, T] or [A, B, T]: to compile for."""
  placement = sharding.batch_sharding(mesh, leading=len(shape) - 2)
  dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
  return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=placement) for dtype in dtypes))
