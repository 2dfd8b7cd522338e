"""Communication of a compiled module between devices, by axis of the mesh."""

from typing import Any, NamedTuple

import numpy as np

from ll3m.planning.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNKNOWN = "unknown"

# The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
_FUSED_SCATTER = "all-reduce-scatter"


class Collective(NamedTuple):
  """All collectives of one kind along one axis, in one run of the module.

  Attributes:
    kind: One of `KINDS`.
    bytes: Bytes that each device sends, by the ring algorithms.
    axis: Axis of the mesh; several are joined by "+".
    between_slices: Whether the collective uses the network between slices.
  """

  kind: str
  bytes: float
  axis: str
  between_slices: bool


def collectives(
  module: Module, axes: dict[str, int], slice_of: np.ndarray | None = None
) -> list[Collective]:
  """Finds the collectives of a module.

  Args:
    module: Module compiled for a mesh; its partitions are the mesh's devices in order.
    axes: Sizes of the mesh's axes, in order.
    slice_of: Slice of each device, in order; None for a single slice.

  Returns:
    One entry per kind and axis, largest first.
  """
  found: dict[Collective, float] = {}
  seen = set()
  for name, instruction in module.instructions():
    # An asynchronous collective may appear several times: in the fusion that starts it, in those
    # that run concurrently, and in the one that waits for it. These form a chain.
    chain = instruction.frontend_attribute("chain_id")
    if chain is not None:
      if (module.home[name], chain) in seen:
        continue
      seen.add((module.home[name], chain))
    operands = [module.computations[name][operand] for operand in instruction.operands]
    read = _between_slices(instruction, operands, axes, slice_of)
    if read is None and (kind := instruction.opcode.removesuffix("-start")) in KINDS:
      kind = "reduce-scatter" if name.startswith(_FUSED_SCATTER) else kind
      read = _within_slice(kind, instruction, operands, axes)
    if read is not None and read.bytes:
      key = read._replace(bytes=0.0)
      found[key] = found.get(key, 0.0) + read.bytes * module.times[name]
  rows = [key._replace(bytes=sent) for key, sent in found.items()]
  return sorted(rows, key=lambda row: -row.bytes)


def _within_slice(
  kind: str, instruction: Instruction, operands: list[Instruction], axes: dict[str, int]
) -> Collective:
  groups = device_groups(instruction.proto)
  devices = 2 if groups is None else groups.shape[1]  # 2: the smallest possible group
  sent = sum(operand.bytes for operand in operands) * _share_sent(kind, devices)
  return Collective(kind, sent, _axis_of(groups, axes), between_slices=False)


def _between_slices(
  instruction: Instruction,
  operands: list[Instruction],
  axes: dict[str, int],
  slice_of: np.ndarray | None,
) -> Collective | None:
  """Reads a collective between slices, which the device hands to its host to send."""
  kind = instruction.frontend_attribute("_xla_megascale_transfer_type")
  if instruction.opcode != "send" or kind is None:
    return None
  axis = UNKNOWN
  if slice_of is not None:
    of = slice_of.reshape(tuple(axes.values()))
    changes = [np.any(np.diff(of, axis=i)) for i in range(of.ndim)]
    axis = "+".join(name for name, changed in zip(axes, changes, strict=True) if changed)
  return Collective(kind.lower().replace("_", "-"), operands[0].bytes, axis, between_slices=True)


def _share_sent(kind: str, devices: int) -> float:
  """Returns the bytes that a device sends in a ring, as a multiple of its operand."""
  return {
    "all-gather": devices - 1,
    "all-reduce": 2 * (devices - 1) / devices,
    "reduce-scatter": (devices - 1) / devices,
    "all-to-all": (devices - 1) / devices,
    "collective-permute": 1,
  }[kind]


def device_groups(instruction: Any) -> np.ndarray | None:
  """Reads the groups of devices that communicate with each other, in any of XLA's forms.

  Args:
    instruction: Proto of a collective.

  Returns:
    [groups, devices per group]; None if all devices form one group, or if groups split an axis.
  """
  if instruction.source_target_pairs:
    pairs = np.array([(pair.source, pair.target) for pair in instruction.source_target_pairs])
    return pairs[pairs[:, 0] != pairs[:, 1]]
  if instruction.HasField("mesh_axes_replica_group_list"):
    return _mesh_groups(instruction.mesh_axes_replica_group_list)
  if instruction.HasField("iota_collective_device_list"):
    return _iota_groups(instruction.iota_collective_device_list)
  listed = instruction.collective_device_list
  if listed.HasField("iota_replica_group_list"):
    return _iota_groups(listed.iota_replica_group_list)
  groups = [list(g.replica_ids) for g in listed.replica_groups or instruction.replica_groups]
  return np.array(groups) if any(groups) else None


def _iota_groups(groups: Any) -> np.ndarray:
  """Reads groups given as an iota, which is reshaped, transposed and reshaped to the groups."""
  base = tuple(groups.iota_reshape_dims)
  ids = np.arange(np.prod(base)).reshape(base).transpose(tuple(groups.iota_transpose_perm) or None)
  return ids.reshape(groups.num_replica_groups, groups.num_devices_per_group)


def _mesh_groups(groups: Any) -> np.ndarray | None:
  if any(axis.HasField("sub_axis_info") for axis in groups.axes):
    return None
  sizes = [axis.size for axis in groups.mesh.axes]
  ids = np.array(groups.mesh.device_ids or range(int(np.prod(sizes)))).reshape(sizes)
  moved = [axis.mesh_axis_index for axis in groups.axes]
  kept = [i for i in range(len(sizes)) if i not in moved]
  width = int(np.prod([sizes[i] for i in moved]))
  return ids.transpose(*kept, *moved).reshape(-1, width)


def _axis_of(groups: np.ndarray | None, axes: dict[str, int]) -> str:
  """Returns the names of the axes along which the devices of a group differ."""
  if groups is None:
    return UNKNOWN
  coordinates = np.stack(np.unravel_index(groups, tuple(axes.values())), axis=-1)
  varies = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
  return "+".join(axis for axis, vary in zip(axes, varies, strict=True) if vary)
