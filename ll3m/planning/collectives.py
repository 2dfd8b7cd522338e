"""What a compiled module sends between devices, and along which axis of the mesh."""

import re
from typing import NamedTuple

import numpy as np

from ll3m.planning.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNKNOWN = "unknown"

# The TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
_FUSED_SCATTER = "all-reduce-scatter"


class Collective(NamedTuple):
  """All collectives of one kind along one axis, in one run of the module.

  Attributes:
    kind: one of KINDS.
    bytes: that each device sends, by the ring algorithms.
    axis: of the mesh; several are joined by "+".
    between_slices: whether it reaches over the network between slices.
  """

  kind: str
  bytes: float
  axis: str
  between_slices: bool


def collectives(
  module: Module, axes: dict[str, int], slice_of: np.ndarray | None = None
) -> list[Collective]:
  """Finds a module's collectives.

  Args:
    module: compiled for a mesh; its partitions are the mesh's devices in order.
    axes: sizes of the mesh's axes, in order.
    slice_of: the slice of each device, in order; None if there is one slice.

  Returns:
    One entry per kind and axis, largest first.
  """
  found: dict[Collective, float] = {}
  seen = set()
  for name, instruction in module.instructions():
    # An asynchronous collective may stand in the fusion that starts it, in those that run beside it
    # and in the one that waits for it: a chain.
    chain = re.search(r'chain_id="(\w+)"', instruction.attributes)
    if chain is not None:
      if (module.home[name], chain[1]) in seen:
        continue
      seen.add((module.home[name], chain[1]))
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
  groups = device_groups(instruction.attributes, axes)
  devices = 2 if groups is None else groups.shape[1]  # the fewest that exchange anything
  sent = sum(operand.bytes for operand in operands) * _share_sent(kind, devices)
  return Collective(kind, sent, _axis_of(groups, axes), between_slices=False)


def _between_slices(
  instruction: Instruction,
  operands: list[Instruction],
  axes: dict[str, int],
  slice_of: np.ndarray | None,
) -> Collective | None:
  """Reads what is handed to the host for its network: a collective of the slices' own devices."""
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
  if instruction.opcode != "send" or kind is None:
    return None
  axis = UNKNOWN
  if slice_of is not None:
    of = slice_of.reshape(tuple(axes.values()))
    changes = [np.any(np.diff(of, axis=i)) for i in range(of.ndim)]
    axis = "+".join(name for name, changed in zip(axes, changes, strict=True) if changed)
  return Collective(kind[1].lower().replace("_", "-"), operands[0].bytes, axis, between_slices=True)


def _share_sent(kind: str, devices: int) -> float:
  """Returns what a device sends in a ring, as a multiple of its operand."""
  return {
    "all-gather": devices - 1,
    "all-reduce": 2 * (devices - 1) / devices,
    "reduce-scatter": (devices - 1) / devices,
    "all-to-all": (devices - 1) / devices,
    "collective-permute": 1,
  }[kind]


def device_groups(attributes: str, axes: dict[str, int]) -> np.ndarray | None:
  """Reads which devices exchange with each other, in any of the forms in which XLA writes it.

  Returns:
    [groups, devices of a group]; None in a form that is not known.
  """
  if (pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)) is not None:
    found = _braces(pairs[1])
    return found[found[:, 0] != found[:, 1]]
  if (listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes)) is not None:
    return _braces(listed[1])
  if (
    tiled := re.search(r"replica_groups=(\[[^ ]*?\](?:T\([\d,]*\))?)[, ]", attributes)
  ) is not None:
    return _tiles(tiled[1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
  if named is None or "(" in named[2]:
    return None
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
  return _named_groups(sizes, re.findall(r"'(\w+)'", named[2]))


def _braces(text: str) -> np.ndarray:
  return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{(.*?)\}", text)])


def _tiles(text: str) -> np.ndarray:
  """Reads "[32,2]<=[16,4]T(1,0)": an iota of the second shape, transposed, in the first's."""
  shape, base, order = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  ids = np.arange(int(np.prod(_numbers(base)))).reshape(_numbers(base))
  return ids.transpose(_numbers(order) if order else None).reshape(_numbers(shape))


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(","))


def _named_groups(sizes: dict[str, int], names: list[str]) -> np.ndarray:
  ids = np.arange(int(np.prod(list(sizes.values())))).reshape(tuple(sizes.values()))
  kept = [i for i, name in enumerate(sizes) if name not in names]
  moved = [list(sizes).index(name) for name in names]
  width = int(np.prod([ids.shape[i] for i in moved]))
  return ids.transpose(*kept, *moved).reshape(-1, width)


def _axis_of(groups: np.ndarray | None, axes: dict[str, int]) -> str:
  """Names the axes along which the devices of a group differ."""
  if groups is None:
    return UNKNOWN
  coordinates = np.stack(np.unravel_index(groups, tuple(axes.values())), axis=-1)
  varies = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
  return "+".join(axis for axis, vary in zip(axes, varies, strict=True) if vary)
