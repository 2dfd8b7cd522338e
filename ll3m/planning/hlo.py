"""The instructions of a compiled module, read from its proto, and how often each of them runs.

XLA's own cost analysis counts the body of a loop only once, but the layers of a model are a loop.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ll3m.planning import hlo_proto

# PrimitiveType numbers of XLA, by bits per element. Booleans take a byte; tokens take nothing.
_CODES_BY_BITS = {
  1: (30, 31), 2: (26, 27), 4: (21, 22, 32), 8: (1, 2, 6, 19, 20, 23, 24, 25, 28, 29, 33),
  16: (3, 7, 10, 16), 32: (4, 8, 11), 64: (5, 9, 12, 15), 128: (18,),
}  # fmt: skip
_BITS = {code: bits for bits, codes in _CODES_BY_BITS.items() for code in codes}
_TUPLE = 13
# Instructions whose computations count; those of a reduction or a sort, for instance, do not.
_RUNS = ("fusion", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array among the operands or results of an instruction.

  Attributes:
    shape: Dimensions.
    bytes: Size without the padding of the layout.
    in_hbm: Whether the array is in the chip's main memory, not in a core's vector or scalar memory.
  """

  shape: tuple[int, ...]
  bytes: int
  in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation.

  Attributes:
    name: Name, unique in the module.
    arrays: Arrays of the result; several for a tuple.
    opcode: Kind, such as "fusion"; asynchronous instructions are named after the operation that
      they start, such as "slice-start".
    operands: Names of the operands.
    runs: Names of the computations that the instruction runs; for a loop, body, then condition.
    proto: Proto with all other fields; see `hlo_proto`.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  runs: tuple[str, ...]
  proto: Any

  @property
  def bytes(self) -> int:
    """Size of the result."""
    return sum(array.bytes for array in self.arrays)

  @property
  def hbm_bytes(self) -> int:
    """Size of the part of the result that is in main memory."""
    return sum(array.bytes for array in self.arrays if array.in_hbm)

  def frontend_attribute(self, key: str) -> str | None:
    """Returns an attribute that XLA copies from the source program; None if it is not set."""
    return next((a.value for a in self.proto.frontend_attributes.map if a.key == key), None)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled module.

  Attributes:
    entry: Name of the computation that runs first.
    computations: Computations by name; each maps names to instructions.
  """

  entry: str
  computations: Mapping[str, Computation]

  @functools.cached_property
  def times(self) -> dict[str, int]:
    """Runs of each computation per run of the module; loops of unknown length count once."""
    counts = dict.fromkeys(self.computations, 0)

    def visit(name: str, times: int) -> None:
      counts[name] += times
      for instruction in self.computations[name].values():
        trips = self._trips(instruction)
        for callee in instruction.runs:
          visit(callee, times * trips)

    visit(self.entry, 1)
    return counts

  @functools.cached_property
  def home(self) -> dict[str, str]:
    """Computation that contains each fusion, at any depth; others map to their own name."""
    homes = {name: name for name in self.computations}
    caller = {
      callee: name
      for name, instructions in self.computations.items()
      for instruction in instructions.values()
      if instruction.opcode == "fusion" or instruction.opcode.startswith("async")
      for callee in instruction.runs
    }
    for name in homes:
      while homes[name] in caller:
        homes[name] = caller[homes[name]]
    return homes

  def instructions(self) -> Iterator[tuple[str, Instruction]]:
    """Yields (computation, instruction) for everything that runs."""
    for name, instructions in self.computations.items():
      if self.times[name]:
        for instruction in instructions.values():
          yield name, instruction

  def _trips(self, instruction: Instruction) -> int:
    """Returns a loop's length: the bound in its condition, since counters go up from 0 by 1."""
    if instruction.opcode != "while":
      return 1
    _, condition = instruction.runs
    bounds = [
      bound
      for i in self.computations[condition].values()
      if i.opcode == "constant" and i.arrays[0].shape == () and (bound := _integer(i)) is not None
    ]
    return bounds[0] if len(bounds) == 1 else 1


def read(compiled: jax.stages.Compiled) -> Module:
  """Reads the module of a compiled program."""
  (module,) = compiled.runtime_executable().hlo_modules()
  return parse(module.as_serialized_hlo_module_proto())


def parse(serialized: bytes) -> Module:
  """Reads a serialized `HloModuleProto`.

  Raises:
    ValueError: The bytes are not a module.
  """
  proto = hlo_proto.parse(serialized)
  found = {computation.id: computation for computation in proto.computations}
  if proto.entry_computation_id not in found:
    raise ValueError("not a compiled module: no entry computation")
  return Module(
    found[proto.entry_computation_id].name,
    {computation.name: _computation(computation, found) for computation in found.values()},
  )


def _computation(proto: Any, computations: Mapping[int, Any]) -> dict[str, Instruction]:
  names = {i.id: i.name for i in proto.instructions}
  return {i.name: _instruction(i, names, computations) for i in proto.instructions}


def _instruction(
  proto: Any, names: Mapping[int, str], computations: Mapping[int, Any]
) -> Instruction:
  opcode, called = proto.opcode, [computations[i] for i in proto.called_computation_ids]
  arrays, operands = tuple(_arrays(proto.shape)), tuple(names[i] for i in proto.operand_ids)
  name = proto.name
  if opcode == "async-start" and (root := _only(called)) is not None:
    # The attributes are those of the wrapped instruction, the only one in its computation.
    opcode, proto, called = f"{root.opcode}-start", root, []
  runs = opcode in _RUNS or opcode.startswith("async")
  return Instruction(
    name, arrays, opcode, operands, tuple(c.name for c in called) if runs else (), proto
  )


def _only(computations: list[Any]) -> Any:
  """Returns the only instruction that is not a parameter; None if there are several."""
  found = [i for c in computations for i in c.instructions if i.opcode != "parameter"]
  return found[0] if len(found) == 1 else None


def _arrays(shape: Any) -> Iterator[Array]:
  if shape.tuple_shapes:
    for part in shape.tuple_shapes:
      yield from _arrays(part)
  elif shape.element_type != _TUPLE:
    dimensions = tuple(shape.dimensions)
    yield Array(
      shape=dimensions,
      bytes=math.prod(dimensions) * _BITS.get(shape.element_type, 0) // 8,
      in_hbm=shape.layout.memory_space == 0,
    )


def _integer(constant: Instruction) -> int | None:
  literal = constant.proto.literal
  values = [*literal.s32s, *literal.u32s, *literal.s64s, *literal.u64s]
  return values[0] if len(values) == 1 else None
