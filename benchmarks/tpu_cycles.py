"""Estimates the TPU cycles of every kernel and of its peers, on any CPU.

  python benchmarks/tpu_cycles.py --quick
  python benchmarks/tpu_cycles.py --generations=v5e,v6e --rows='H=128|rms_norm'

Writes a table (cycles.md), all figures (cycles.json) and a chart per generation (PNG) to
--output_dir, and reuses the estimates in it. benchmarks/README.md describes the method and its
limits.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that scripts find `benchmarks`

from benchmarks import cycle_report
from benchmarks.cycle_rows import Peer, Row, rows
from benchmarks.tuning.cache import Ledger, Task
from benchmarks.tuning.estimates import CHIPS
from ll3m.core import flags, options


@dataclasses.dataclass(frozen=True)
class CyclesConfig:
  """The choice of rows to price."""

  generations: str = options.option("", "TPU generations, separated by commas; all by default.")
  rows: str = options.option("", "Regular expression that selects rows by name; all by default.")
  quick: bool = options.option(
    False, "Estimate only a few rows, for v5e and v6e, in less than ten minutes."
  )
  output_dir: str = options.option("runs/cycles", "Folder for the results and the estimates.")
  workers: int = options.option(2, "Number of kernels that are compiled in parallel.")
  seconds: float = options.option(600.0, "Time limit of each estimate in seconds.")

  def __post_init__(self):
    for name in filter(None, self.generations.split(",")):
      if name not in CHIPS:
        raise ValueError(f"`generations` expects any of {', '.join(CHIPS)}, got {name!r}")
    try:
      re.compile(self.rows)
    except re.error as error:
      raise ValueError(f"`rows` is not a regular expression: {error}") from error
    if self.workers < 1:
      raise ValueError(f"`workers` must be at least 1, got {self.workers}")
    if not self.seconds > 0:
      raise ValueError(f"`seconds` must be positive, got {self.seconds}")

  def chosen_generations(self) -> tuple[str, ...]:
    """Returns the generations to price."""
    default = ("v5e", "v6e") if self.quick else tuple(CHIPS)
    return tuple(filter(None, self.generations.split(","))) or default

  def chosen_rows(self) -> list[Row]:
    """Returns the rows to price."""
    found = [
      row
      for row in rows()
      if (row.is_quick or not self.quick) and re.search(self.rows, f"{row.group} {row.name}")
    ]
    if not found:
      raise ValueError(f"`rows` must match the name of a row, got {self.rows!r}")
    return found


FLAG_GROUPS = {"": CyclesConfig}
_ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
  """Prices rows and writes the report; see `flags.call` for `argv` and the exit code."""
  return flags.call(_price, FLAG_GROUPS, argv, doc=__doc__)


def _price(given: flags.Flags) -> None:
  """Prices rows and writes the report."""
  from tqdm import tqdm

  config = given[""]
  # Ordered by row, so that the generations of a shape are adjacent.
  chosen = [
    (generation, row.on(generation))
    for row in config.chosen_rows()
    for generation in config.chosen_generations()
  ]
  tasks = [task for generation, row in chosen for task in all_tasks(generation, row)]
  folder = Path(config.output_dir)
  ledger = Ledger(folder / "estimates.jsonl")
  found = {}
  unique = {task.key for task in tasks}
  with tqdm(total=len(unique), unit="estimate") as bar:
    for task, result in ledger.run(tasks, workers=config.workers, seconds=config.seconds):
      found[task.key] = result
      bar.update()
  figures = [
    figure
    for generation, row in chosen
    for figure in cycle_report.figures_of(
      generation,
      row,
      found[our_task(generation, row).key],
      {
        (part.name, peer.name): [found[task.key] for task in peer_tasks(generation, row, peer)]
        for part in row.passes
        for peer in part.peers
      },
    )
  ]
  print(cycle_report.write(figures, folder))
  # The table lists the kernels on which the profile aborts. A figure that cannot be true is an
  # error.
  defects = [f for f in figures if f.ours.problem == cycle_report.NOT_COMPARABLE]
  if defects:
    raise ValueError(
      f"{len(defects)} of {len(figures)} figures are not valid: "
      + "; ".join(f"{f.name} {f.generation} {f.pass_name}: {f.ours.reason}" for f in defects[:5])
    )


def all_tasks(generation: str, row: Row) -> list[Task]:
  """Returns all tasks of a row: our kernels and the peers."""
  peers = [peer for part in row.passes for peer in part.peers]
  return [
    our_task(generation, row),
    *(task for peer in peers for task in peer_tasks(generation, row, peer)),
  ]


def our_task(generation: str, row: Row) -> Task:
  """Returns the task that prices our own kernels."""
  return _task(generation, row, {"implementation": "ours"})


def peer_tasks(generation: str, row: Row, peer: Peer) -> list[Task]:
  """Returns the tasks that price a peer, one for each block size to try."""
  changes = {"implementation": peer.implementation, **peer.changes}
  return [
    _task(generation, row, changes | {"block": block}, peer.whole_program) for block in peer.blocks
  ]


def _task(generation, row, changes, whole_program=False) -> Task:
  sources = [_ROOT / "benchmarks" / "cycle_builders.py"]
  if changes["implementation"] == "ours":
    sources.append(_ROOT / "kernels" / "ll3m_kernels")
  return Task(
    generation,
    f"benchmarks.cycle_builders:{row.builder}",
    {**row.arguments, **changes},
    tuple(map(str, sources)),
    count_products=row.builder == "attention",
    whole_program=whole_program,
  )


if __name__ == "__main__":
  sys.exit(main())
