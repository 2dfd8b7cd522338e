"""Kinds of layers in models whose layers alternate, and how their parameters are stacked."""

from collections.abc import Sequence
from typing import NamedTuple


class LayerKind(NamedTuple):
  """What layers of a model differ in.

  Attributes:
    window: Number of keys that a query sees, including its own; None for all up to it.
    rope: Rotary embedding: "global", "local" (of rope_local_theta), or None.
  """

  window: int | None
  rope: str | None


class Stack(NamedTuple):
  """Layers of one kind, whose parameters are stacked along a leading axis.

  Attributes:
    prefix: Prefix of the names of the parameters' modules.
    kind: Kind of the layers.
    run: Number of layers that follow each other.
    layers: Numbers of the layers, in the order of the leading axis.
  """

  prefix: str
  kind: LayerKind
  run: int
  layers: tuple[int, ...]

  @property
  def is_rest(self) -> bool:
    """Whether the layers follow the last whole repetition of the pattern."""
    return self.prefix.startswith("rest")


class _Run(NamedTuple):
  kind: LayerKind
  layers: list[int]


def _runs(kinds: Sequence[LayerKind]) -> list[_Run]:
  """Divides layers into runs of consecutive layers of one kind."""
  runs: list[_Run] = []
  for number, kind in enumerate(kinds):
    if not runs or runs[-1].kind != kind:
      runs.append(_Run(kind, []))
    runs[-1].layers.append(number)
  return runs


def shortest_cycle(items: Sequence[str]) -> tuple[str, ...]:
  """Returns the shortest sequence that, repeated and cut off, gives the items."""
  for size in range(1, len(items)):
    if all(item == items[i % size] for i, item in enumerate(items)):
      return tuple(items[:size])
  return tuple(items)


def stacks_of(pattern: Sequence[LayerKind], num_layers: int) -> tuple[Stack, ...]:
  """Returns the stacks of a model's layers, in the order in which their first layers run.

  Consecutive layers of one kind are a stack, together with those in all repetitions of the pattern.
  The layers after the last whole repetition have stacks of their own.

  Args:
    pattern: The kinds of layers; layer i is of kind pattern[i % len(pattern)].
    num_layers: L, the number of layers.
  """
  size = len(pattern)
  whole = num_layers - num_layers % size
  repeated = [
    (run.kind, [start + i for start in range(0, whole, size) for i in run.layers], len(run.layers))
    for run in _runs(pattern)
  ]
  rest = [
    (run.kind, [whole + i for i in run.layers], len(run.layers))
    for run in _runs(pattern[: num_layers - whole])
  ]
  return tuple(
    Stack(f"{name}/" if len(runs) == 1 else f"{name}_{number}/", kind, length, tuple(layers))
    for name, runs in (("layers", repeated), ("rest_layers", rest))
    for number, (kind, layers, length) in enumerate(runs)
  )
