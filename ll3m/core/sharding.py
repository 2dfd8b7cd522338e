"""The device mesh, and how parameters and batches are split over it.

Axes: dp replicates the parameters and splits the batch; fsdp splits both (Zhao et al., 2023); mp
splits heads, feed-forward and vocabulary (Shoeybi et al., 2019).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("dp", "fsdp", "mp")
BATCH_AXES = ("dp", "fsdp")
HEAD_AXIS = "mp"

# Parameter path -> the mesh axis of each dimension. Layers are stacked along dimension 0.
# Names of stacks of layers: see `ModelConfig.stacks`.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
  (r"embed/embedding", PartitionSpec("mp", "fsdp")),
  (r"(rest_)?layers(_\d+)?/attention/(query|key|value)/w", PartitionSpec(None, "fsdp", "mp")),
  (r"(rest_)?layers(_\d+)?/attention/(query|key|value)/b", PartitionSpec(None, "mp")),
  (r"(rest_)?layers(_\d+)?/attention/out/w", PartitionSpec(None, "mp", "fsdp")),
  (r"(rest_)?layers(_\d+)?/attention/out/b", PartitionSpec(None, "fsdp")),
  (r"(rest_)?layers(_\d+)?/mlp/(gate|up)/w", PartitionSpec(None, "fsdp", "mp")),
  (r"(rest_)?layers(_\d+)?/mlp/(gate|up)/b", PartitionSpec(None, "mp")),
  (r"(rest_)?layers(_\d+)?/mlp/down/w", PartitionSpec(None, "mp", "fsdp")),
  (r"(rest_)?layers(_\d+)?/mlp/down/b", PartitionSpec(None, "fsdp")),
  (r"(rest_)?layers(_\d+)?/(attention|mlp)(_out)?_norm/(scale|bias)", PartitionSpec()),
  (r"(rest_)?layers(_\d+)?/attention/(query|key)_norm/scale", PartitionSpec()),
  (r"final_norm/(scale|bias)", PartitionSpec()),
  (r"head/w", PartitionSpec("fsdp", "mp")),
  (r"head/b", PartitionSpec("mp")),
)


def parse_mesh_dim(text: str) -> tuple[int, int, int]:
  """Parses `mesh_dim`: 'dp,fsdp,mp' or 'dp:1,fsdp:-1,mp:4'; -1 stands for all other devices.

  Raises:
    ValueError: The text has neither form.
  """
  form = "`mesh_dim` must be dp,fsdp,mp, e.g. -1,2,4 or dp:1,fsdp:-1,mp:4"
  parts = [part.strip() for part in text.split(",")]
  try:
    if ":" in text:
      named = {name.strip(): int(size) for name, size in (part.split(":") for part in parts)}
      if len(named) != len(parts) or not set(named) <= set(AXES):
        raise ValueError
      sizes = tuple(named.get(axis, 1) for axis in AXES)
    else:
      sizes = tuple(int(part) for part in parts)
  except ValueError:
    raise ValueError(f"{form}, got {text!r}") from None
  if len(sizes) != len(AXES) or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"{form}, got {text!r}")
  if sizes.count(-1) > 1:
    raise ValueError(f"at most one size of `mesh_dim` may be -1, got {text!r}")
  return sizes


def make_mesh(mesh_dim: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges the devices in a mesh of the sizes in `mesh_dim`.

  Raises:
    ValueError: The product of the sizes is not the number of devices, or dp is not a multiple of
      the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = parse_mesh_dim(mesh_dim)
  known = math.prod(size for size in sizes if size != -1)
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise ValueError(
      f"`mesh_dim`={mesh_dim} needs {'a multiple of ' * (-1 in sizes)}{known} devices, "
      f"there are {len(devices)}"
    )
  shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
  return Mesh(_arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_slices(devices: Sequence[jax.Device]) -> int:
  """Returns the number of TPU slices that devices belong to; 1 for devices without slices."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def _arrange(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Arranges devices so that neighbours in the mesh are neighbours in the machine.

  The network between TPU slices is a hundred times slower than the links within them. Only dp,
  whose devices exchange nothing but gradients, may span slices.
  """
  slices = num_slices(devices)
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
  dp, *within = shape
  if dp % slices:
    raise ValueError(f"dp must be a multiple of the {slices} slices, got dp={dp}")
  return mesh_utils.create_hybrid_device_mesh(
    (dp // slices, *within), (slices, 1, 1), devices=devices, allow_split_physical_axes=True
  )


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """Returns a parameter's sharding; indivisible dimensions are not split (see `unsplit`).

  Args:
    path: The parameter, as "module/name".
    shape: Shape of the parameter, with the leading L if it is stacked.
    mesh: The mesh.

  Raises:
    ValueError: The number of matching rules in the table is not one.
  """
  axes = _axes_of(path, shape)
  return PartitionSpec(
    *(
      None if axis is not None and size % mesh.shape[axis] else axis
      for size, axis in zip(shape, axes, strict=True)
    )
  )


def unsplit(params: Mapping[str, Mapping[str, Any]], mesh: Mesh) -> list[str]:
  """Describes the dimensions that the table would split but every device holds whole.

  Args:
    params: A Haiku tree of arrays or shapes.
    mesh: The mesh.
  """
  return [
    f"{module}/{name}: {size} is not divisible by {axis}={mesh.shape[axis]}"
    for module, arrays in params.items()
    for name, array in arrays.items()
    for size, axis in zip(array.shape, _axes_of(f"{module}/{name}", array.shape), strict=True)
    if axis is not None and size % mesh.shape[axis]
  ]


def _axes_of(path: str, shape: Sequence[int]) -> tuple[str | None, ...]:
  matches = [spec for pattern, spec in PARAMETER_RULES if re.fullmatch(pattern, path)]
  if len(matches) != 1:
    raise ValueError(f"{len(matches)} sharding rules match parameter {path!r}, expected one")
  return tuple(matches[0]) + (None,) * (len(shape) - len(matches[0]))


def parameter_shardings(params: Mapping[str, Mapping[str, Any]], mesh: Mesh) -> dict:
  """Returns a `NamedSharding` for every parameter (arrays or shapes) of a Haiku tree."""
  return {
    module: {
      name: NamedSharding(mesh, parameter_spec(f"{module}/{name}", array.shape, mesh))
      for name, array in arrays.items()
    }
    for module, arrays in params.items()
  }


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """Returns the sharding of [B, ...] arrays, whose rows are split over dp and fsdp.

  Args:
    mesh: The mesh.
    leading: Number of unsplit dimensions before B.
  """
  return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Returns the rows of a global batch that this process must read.

  Raises:
    ValueError: The number of rows is not a multiple of dp x fsdp.
  """
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if batch_size % shards:
    raise ValueError(
      f"`batch_size` must be a multiple of dp x fsdp = {shards}, got {batch_size} "
      f"(it counts the sequences of a micro-step over all devices)"
    )
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return sorted({row for (rows,) in indices.values() for row in range(batch_size)[rows]})
