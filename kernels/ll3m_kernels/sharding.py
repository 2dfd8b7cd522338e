"""Kernels on a mesh of devices.

The compiler cannot partition a kernel by itself, so an operation that is given a `Sharding` runs
its forward and its backward pass each in a `jax.shard_map`, on what one device holds. Nothing is
differentiated through the maps: what has to be summed over devices is summed once, by name.
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
  """How a model's activations lie on a mesh.

  Attributes:
    mesh: the devices; also those that kernels are laid out for, if they are TPUs.
    batch_axes: mesh axes over which the batch, the first dimension of every array, is split.
    head_axis: mesh axis over which attention heads are split; None if they are not.

  Where the mesh's axes are Explicit, arrays have to lie as this says.

  Raises:
    ValueError: no mesh, or axes that it has not, or one axis twice.
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
      raise ValueError(f"an axis can split one dimension only, got {', '.join(named)}")

  @property
  def batch_shards(self) -> int:
    """How many parts the batch is split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

  @property
  def head_shards(self) -> int:
    """How many parts the heads are split into."""
    return 1 if self.head_axis is None else self.mesh.shape[self.head_axis]

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


def check_sharding(sharding: Any) -> None:
  """Demands a `Sharding`, or None.

  Raises:
    ValueError: it is something else.
  """
  if sharding is not None and not isinstance(sharding, Sharding):
    raise ValueError(f"sharding must be a Sharding or None, got {sharding!r}")


def laid_out_for(sharding: Sharding | None) -> contextlib.AbstractContextManager[None]:
  """Settles the TPU that a call's kernels are laid out for, while it is open.

  Whatever depends on it, be it a choice, an explanation or a kernel, is to be computed inside of
  this. That is the TPU of the sharding's mesh; else see `dispatch.generation`.
  """
  return dispatch.pin(None if sharding is None else dispatch.kind_of(sharding.mesh))


def own_part(sharding: Sharding | None, x: Any, spec: PartitionSpec | None) -> Any:
  """Describes what one device holds of an array that is split as a spec says.

  Args:
    sharding: on which mesh; None for one device.
    x: an array that divides, or anything with a shape and a dtype.
    spec: as for `map_shards`; None where nothing is split.
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
  """Returns the function as it runs on every device's part; itself where there is one device.

  Kernels in it are laid out as `laid_out_for` says.
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
