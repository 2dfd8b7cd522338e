"""Prices every kernel in cycles of a TPU, and its peers beside it, on any CPU.

  python benchmarks/tpu_cycles.py --quick
  python benchmarks/tpu_cycles.py --generations=v5e,v6e --rows='H=128|rms_norm'

Writes a table (cycles.md), all figures (cycles.json) and a chart per generation (PNG) to
--output_dir; estimates that are already there are not made again. benchmarks/README.md has the
method and its limits.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, too, for `benchmarks`

from benchmarks import cycle_report
from benchmarks.cycle_rows import Peer, Row, rows
from benchmarks.tuning.cache import Ledger, Task
from benchmarks.tuning.estimates import CHIPS
from ll3m.core import flags, options


@dataclasses.dataclass(frozen=True)
class CyclesConfig:
  """What to price."""

  generations: str = options.option("", "TPU generations, separated by commas; all by default.")
  rows: str = options.option("", "A regular expression that the names of rows have to match.")
  quick: bool = options.option(False, "Few rows, on v5e and v6e, in less than ten minutes.")
  output_dir: str = options.option("runs/cycles", "Folder of the results.")
  workers: int = options.option(2, "How many kernels are compiled at a time.")
  seconds: float = options.option(600.0, "Seconds after which an estimate is given up.")

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
    """Returns what to price for."""
    default = ("v5e", "v6e") if self.quick else tuple(CHIPS)
    return tuple(filter(None, self.generations.split(","))) or default

  def chosen_rows(self) -> list[Row]:
    """Returns what to price."""
    found = [
      row
      for row in rows()
      if (row.is_quick or not self.quick) and re.search(self.rows, f"{row.group} {row.name}")
    ]
    if not found:
      raise ValueError(f"`rows`: none of the rows matches {self.rows!r}")
    return found


FLAG_GROUPS = {"": CyclesConfig}
_ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
  """Prices and reports; see `flags.call` for `argv` and the exit code that it returns."""
  return flags.call(_price, FLAG_GROUPS, argv, doc=__doc__)


def _price(given: flags.Flags) -> None:
  """Prices and reports."""
  from tqdm import tqdm

  config = given[""]
  # By row, so that the generations of a shape stand together.
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
  # What the profile aborts on is told in the table. A figure that cannot be true is a defect.
  defects = [f for f in figures if f.ours.problem == cycle_report.NOT_COMPARABLE]
  if defects:
    raise ValueError(
      f"{len(defects)} of {len(figures)} figures are not results: "
      + "; ".join(f"{f.name} {f.generation} {f.pass_name}: {f.ours.reason}" for f in defects[:5])
    )


def all_tasks(generation: str, row: Row) -> list[Task]:
  """Returns all that has to be priced for a row."""
  peers = [peer for part in row.passes for peer in part.peers]
  return [
    our_task(generation, row),
    *(task for peer in peers for task in peer_tasks(generation, row, peer)),
  ]


def our_task(generation: str, row: Row) -> Task:
  """Returns how to price our own kernels."""
  return _task(generation, row, {"implementation": "ours"})


def peer_tasks(generation: str, row: Row, peer: Peer) -> list[Task]:
  """Returns how to price a peer, with each of the blocks to try."""
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
