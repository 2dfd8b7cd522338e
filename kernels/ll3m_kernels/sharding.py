"""Kernels on a mesh of devices.

The compiler cannot partition a kernel by itself, so an operation with a `Sharding` runs its forward
and its backward pass each in a `jax.shard_map`, on one device's shard. The maps themselves are not
differentiated: each sum over devices is written out once, by axis name.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from ll3m_kernels import dispatch


@dataclasses.dataclass(frozen=True)
class Sharding:
  """The layout of a model's activations on a mesh.

  On a mesh with Explicit axes, arrays must have this layout.

  Attributes:
    mesh: Devices; kernels are laid out for them if they are TPUs.
    batch_axes: Mesh axes over which the batch, the first dimension of every array, is split.
    head_axis: Mesh axis over which attention heads are split; None if they are not.

  Raises:
    ValueError: A field has the wrong type, or an axis is not in the mesh or is named twice.
  """

  mesh: Mesh | AbstractMesh
  batch_axes: tuple[str, ...] = ("dp", "fsdp")
  head_axis: str | None = "mp"

  def __post_init__(self):
    if not isinstance(self.mesh, Mesh | AbstractMesh):
      raise ValueError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {self.mesh!r}")
    axes = self.batch_axes
    if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
      raise ValueError(f"batch_axes must be a tuple of names, such as ('dp',), got {axes!r}")
    if self.head_axis is not None and not isinstance(self.head_axis, str):
      raise ValueError(f"head_axis must be a name or None, got {self.head_axis!r}")
    named = axes if self.head_axis is None else (*axes, self.head_axis)
    if missing := [axis for axis in named if axis not in self.mesh.axis_names]:
      raise ValueError(f"the mesh has the axes {self.mesh.axis_names}, got {', '.join(missing)}")
    if len(set(named)) < len(named):
      raise ValueError(f"a mesh axis can split only one dimension, got {', '.join(named)}")

  @property
  def batch_shards(self) -> int:
    """The number of shards of the batch."""
    return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

  @property
  def head_shards(self) -> int:
    """The number of shards of the heads."""
    return 1 if self.head_axis is None else self.mesh.shape[self.head_axis]

  def rows(self, ndim: int) -> PartitionSpec:
    """Returns the spec of an array with `ndim` dimensions, of which the first is the batch."""
    return PartitionSpec(self.batch_axes, *(None,) * (ndim - 1))

  def check_batch(self, name: str, shape: tuple[int, ...]) -> None:
    """Checks that a batch can be split over the batch axes.

    Raises:
      ValueError: The first dimension is not a multiple of the number of shards.
    """
    if not shape or shape[0] % self.batch_shards:
      raise ValueError(
        f"the first dimension of {name} must be a multiple of "
        f"{' x '.join(self.batch_axes)} = {self.batch_shards}, got {list(shape)}"
      )


def check_sharding(sharding: Any) -> None:
  """Checks that an argument is a `Sharding` or None.

  Raises:
    ValueError: The argument is neither.
  """
  if sharding is not None and not isinstance(sharding, Sharding):
    raise ValueError(f"sharding must be a Sharding or None, got {sharding!r}")


def laid_out_for(sharding: Sharding | None) -> contextlib.AbstractContextManager[None]:
  """Fixes the TPU that a call's kernels are laid out for, inside the context.

  It is the TPU of the sharding's mesh, else see `dispatch.generation`. Choices, explanations and
  kernels that depend on it must be computed inside.
  """
  return dispatch.pin(None if sharding is None else dispatch.kind_of(sharding.mesh))


def own_part(sharding: Sharding | None, x: Any, spec: PartitionSpec | None) -> Any:
  """Describes one device's shard of an array.

  Args:
    sharding: Sharding with the mesh; None for one device.
    x: Array that divides evenly, or anything with a shape and a dtype.
    spec: Partition spec of x; None if it is not split.
  """
  shape = list(x.shape)
  if sharding is not None and spec is not None:
    for axis, names in enumerate(spec):
      names = (names,) if isinstance(names, str) else names or ()
      shape[axis] //= math.prod(sharding.mesh.shape[name] for name in names)
  return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def map_shards(
  function: Callable[..., Any], sharding: Sharding | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """Maps a function over the devices' shards; on one device, it runs on whole arrays.

  Kernels in the function are laid out for the TPU that `laid_out_for` chooses.
  """
  mapped = function
  if sharding is not None and sharding.mesh.size > 1:
    mapped = jax.shard_map(
      function, mesh=sharding.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

  def run(*arrays):
    with laid_out_for(sharding):
      return mapped(*arrays)

  return run


def vary_alike(*arrays: Array | None) -> list[Array | None]:
  """Makes all arrays vary over the same mesh axes, inside a caller's own `shard_map`.

  With `check_vma` on, a kernel's operands must vary alike. The cotangent of an operand that the
  devices share is then the sum of their cotangents.
  """
  varying = frozenset().union(*(jax.typeof(a).mat.varying for a in arrays if a is not None))

  def cast(array):
    if array is None:
      return None
    missing = tuple(varying - jax.typeof(array).mat.varying)
    return jax.lax.pcast(array, missing, to="varying") if missing else array

  return [cast(array) for array in arrays]


def result(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
  """Describes a kernel's result, which varies over the same mesh axes as its operand `like`."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
