"""A compiled module, read from its text: instructions, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once, and the layers of a model are a loop.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(calls|body|condition|branch_computations|true_computation|false_computation|to_apply)="
  r"(\{[^}]*\}|%[\w.\-]+)"
)
_BITS = re.compile(r"[a-z]+(\d+)")
# A reduction's or sort's function is not worth counting, and an all-reduce has one too.
_NOT_COUNTED = "to_apply"


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's operands or results.

  Attributes:
    shape: dimensions.
    bytes: its size, padding of layouts not counted.
    in_hbm: it lies in the chip's main memory, not in a core's vector or scalar memory.
  """

  shape: tuple[int, ...]
  bytes: int
  in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the module.
    arrays: of the result; several for a tuple.
    opcode: such as "fusion".
    operands: names.
    attributes: the rest of the line.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def bytes(self) -> int:
    """Size of the result."""
    return sum(array.bytes for array in self.arrays)

  @property
  def hbm_bytes(self) -> int:
    """Size of the part of the result that lies in main memory."""
    return sum(array.bytes for array in self.arrays if array.in_hbm)

  def called(self) -> Iterator[tuple[str, str]]:
    """Yields (how, name) for every computation that the instruction refers to."""
    for how, names in _CALLED.findall(self.attributes):
      for name in _NAME.findall(names):
        yield how, name


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled module.

  Attributes:
    entry: name of the computation that runs first.
    computations: instructions by name, by the computation's name.
  """

  entry: str
  computations: Mapping[str, Computation]

  @functools.cached_property
  def times(self) -> dict[str, int]:
    """How often each computation runs in one run of the module; loops without a count run once."""
    counts = dict.fromkeys(self.computations, 0)

    def visit(name: str, times: int) -> None:
      counts[name] += times
      for instruction in self.computations[name].values():
        trips = self._trips(instruction)
        for how, callee in instruction.called():
          if how != _NOT_COUNTED or instruction.opcode == "call":
            visit(callee, times * trips)

    visit(self.entry, 1)
    return counts

  @functools.cached_property
  def home(self) -> dict[str, str]:
    """The computation that a fusion belongs to, however deep; every other one's own name."""
    homes = {name: name for name in self.computations}
    caller = {
      callee: name
      for name, instructions in self.computations.items()
      for instruction in instructions.values()
      if instruction.opcode == "fusion" or instruction.opcode.startswith("async")
      for _, callee in instruction.called()
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
    """Returns a loop's count, which its condition compares with: counts start at 0 and add 1."""
    if instruction.opcode != "while":
      return 1
    (condition,) = (name for how, name in instruction.called() if how == "condition")
    bounds = [
      int(match[1])
      for i in self.computations[condition].values()
      if i.opcode == "constant" and (match := re.match(r"(\d+)$", i.attributes))
    ]
    return bounds[0] if len(bounds) == 1 else 1


def parse(text: str) -> Module:
  """Reads what `jax.stages.Compiled.as_text` gives.

  Raises:
    ValueError: it is not the text of a module.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if (match := _COMPUTATION.match(line)) is not None:
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)) is not None:
      current[match[1]] = _instruction(match[1], match[2])
  if entry is None:
    raise ValueError(f"not the text of a compiled module: {text[:60]!r}")
  return Module(entry, computations)


def _instruction(name: str, text: str) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  start = text.index("(", end)
  stop = _closing(text, start)
  opcode, inner = text[end:start].strip(), text[start + 1 : stop]
  return Instruction(
    name=name,
    arrays=tuple(_arrays(text[:end])),
    opcode=opcode,
    operands=() if opcode == "constant" else tuple(_NAME.findall(inner)),
    attributes=inner if opcode in ("constant", "parameter") else text[stop + 1 :],
  )


def _closing(text: str, start: int) -> int:
  """Returns where the parenthesis that opens at `start` closes."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.start()
  raise ValueError(f"unbalanced parentheses: {text[:80]!r}")


def _arrays(text: str) -> Iterator[Array]:
  for dtype, dimensions, layout in _ARRAY.findall(text):
    shape = tuple(int(size) for size in dimensions.split(",") if size)
    bits = _BITS.match(dtype)
    count = 1
    for size in shape:
      count *= size
    space = re.search(r"S\((\d+)\)", layout)
    yield Array(
      shape=shape,
      bytes=count * (int(bits[1]) if bits else 8) // 8,  # pred takes a byte
      in_hbm=space is None or space[1] == "0",
    )
