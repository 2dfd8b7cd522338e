"""Kernels on a mesh of devices.

The compiler cannot partition a kernel by itself, so an operation that is given a `Sharding` runs
its forward and its backward pass each in a `jax.shard_map`, on what one device holds. Nothing is
differentiated through the maps: what has to be summed over devices is summed once, by name.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Sharding:
  """How a model's activations lie on a mesh.

  Attributes:
    mesh: the devices.
    batch_axes: mesh axes over which the batch, the first dimension of every array, is split.
    head_axis: mesh axis over which attention heads are split; None if they are not.
  """

  mesh: Mesh | AbstractMesh
  batch_axes: tuple[str, ...] = ("dp", "fsdp")
  head_axis: str | None = "mp"

  def __post_init__(self):
    named = (*self.batch_axes, *((self.head_axis,) if self.head_axis else ()))
    if missing := [axis for axis in named if axis not in self.mesh.axis_names]:
      raise ValueError(f"the mesh has the axes {self.mesh.axis_names}, got {', '.join(missing)}")

  @property
  def batch_shards(self) -> int:
    """How many parts the batch is split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

  @property
  def head_shards(self) -> int:
    """How many parts the heads are split into."""
    return self.mesh.shape[self.head_axis] if self.head_axis else 1

  def rows(self, ndim: int) -> PartitionSpec:
    """The spec of an array of so many dimensions whose first one is the batch."""
    return PartitionSpec(self.batch_axes, *(None,) * (ndim - 1))

  def check_batch(self, name: str, shape: tuple[int, ...]) -> None:
    """Demands that a batch can be split.

    Raises:
      ValueError: it does not divide.
    """
    if not shape or shape[0] % self.batch_shards:
      raise ValueError(
        f"the first dimension of {name} must be a multiple of "
        f"{' x '.join(self.batch_axes)} = {self.batch_shards}, got {list(shape)}"
      )


def map_shards(
  function: Callable[..., Any], sharding: Sharding | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """Returns the function as it runs on every device's part; itself where there is one device."""
  if sharding is None or sharding.mesh.size == 1:
    return function
  return jax.shard_map(
    function, mesh=sharding.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def vary_alike(*arrays: Array | None) -> list[Array | None]:
  """Makes all arrays vary over the mesh axes that any does, in a caller's own `shard_map`.

  With `check_vma` on, a kernel's operands have to; the cotangent of one that all devices share is
  then the sum of theirs.
  """
  varying = frozenset().union(*(jax.typeof(a).mat.varying for a in arrays if a is not None))

  def cast(array):
    if array is None:
      return None
    missing = tuple(varying - jax.typeof(array).mat.varying)
    return jax.lax.pcast(array, missing, to="varying") if missing else array

  return [cast(array) for array in arrays]


def result(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
  """Describes a kernel's result, which varies over the mesh axes that its operand does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
