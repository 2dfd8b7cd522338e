"""Search for the limits of a shape that cost the fewest cycles."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ll3m_kernels
from benchmarks.tuning import search_space
from benchmarks.tuning.cache import Ledger, Task
from benchmarks.tuning.search_space import OPERATIONS, Shape
from ll3m_kernels import block_tables
from ll3m_kernels.dispatch import GENERATIONS

_BUILDER = "benchmarks.tuning.search_space:build"
_KERNELS = Path(ll3m_kernels.__file__).parent
_SOURCES = tuple(
  str(path)
  for path in (
    *(_KERNELS / name for name in ("attention", "norms", "dispatch.py", "block_arithmetic.py")),
    Path(search_space.__file__),
  )
)
# The smallest relative gain in cycles that justifies other blocks and their memory.
_LEAST_GAIN = 0.01


class Found(NamedTuple):
  """The result for a shape.

  Attributes:
    key: Key in the tables.
    limits: Best limits.
    cycles: Cycles of each kernel with these limits and with the rule's.
    failures: Candidates that could not be priced, with the reasons.
  """

  key: block_tables.Key
  limits: dict[str, int]
  cycles: dict[str, dict[str, int]]
  failures: tuple[str, ...]


class Search:
  """A coordinate search: it varies one limit after the other until none improves."""

  def __init__(
    self,
    ledger: Ledger,
    *,
    workers: int,
    seconds: float,
    report: Callable[[], None],
  ):
    """Prepares a search.

    Args:
      ledger: Cache of the estimates.
      workers: Number of parallel compilations.
      seconds: Time limit of each estimate.
      report: Callback after each estimate.
    """
    self._ledger, self._report = ledger, report
    self._options = {"workers": workers, "seconds": seconds}

  def run(self, operation: str, generation: str, shape: Shape) -> Found:
    """Searches for the best limits of one shape.

    Raises:
      RuntimeError: The rule's limits cannot be priced.
    """
    chip, described = GENERATIONS[generation], OPERATIONS[operation]
    start = described.rule(shape, chip)
    best, cycles, failures = dict(start._asdict()), {}, []
    for kernel, options in described.options.items():

      def price(candidates: Sequence[Mapping[str, int]], kernel=kernel):
        return self._price(operation, kernel, generation, shape, candidates)

      ((_, rule_cycles),) = price([best])
      if isinstance(rule_cycles, str):
        raise RuntimeError(f"{kernel} at {shape} cannot be priced: {rule_cycles}")
      before, least = best, rule_cycles
      improved = True
      while improved:
        improved = False
        for name, values in options.items():
          candidates = [best | {name: value} for value in values if value != best[name]]
          candidates = [c for c in candidates if described.serves(type(start)(**c), shape, chip)]
          for candidate, result in price(candidates):
            if isinstance(result, str):
              failures.append(f"{kernel} {candidate}: {result}")
            elif result < least:
              best, least, improved = candidate, result, True
      if least > (1 - _LEAST_GAIN) * rule_cycles:
        best, least = before, rule_cycles
      cycles[kernel] = {"tuned": least, "rule": rule_cycles}
    return Found(described.key(shape, chip), best, cycles, tuple(failures))

  def _price(
    self,
    operation: str,
    kernel: str,
    generation: str,
    shape: Shape,
    candidates: Sequence[Mapping[str, int]],
  ) -> Iterator[tuple[dict[str, int], int | str]]:
    """Yields candidates in order, each with its cycles or the reason why there are none."""
    limits = {}
    for candidate in candidates:
      arguments = {"operation": operation, "kernel": kernel, "shape": list(shape)}
      task = Task(generation, _BUILDER, {**arguments, "limits": dict(candidate)}, _SOURCES)
      limits[task.key] = (task, dict(candidate))
    results = {}
    tasks = [task for task, _ in limits.values()]
    for task, result in self._ledger.run(tasks, **self._options):
      results[task.key] = result
      self._report()
    for key, (_, candidate) in limits.items():
      result = results[key]
      yield candidate, result if isinstance(result, str) else sum(k.cycles for k in result)
