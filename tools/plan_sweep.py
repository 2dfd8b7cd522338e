"""Plans Llama 2 7B for several numbers of chips, lengths and batch sizes, and plots the cost.

  python tools/plan_sweep.py --output_dir=docs

Writes scaling.json, with parts of the output of `ll3m.plan --json` for every case, and scaling.png.
Cases that scaling.json already contains are not planned again. Takes a minute or two per case.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ll3m.core import flags, options


@dataclasses.dataclass(frozen=True)
class SweepOptions:
  """Flags of the command."""

  output_dir: str = options.option("docs", "Folder of scaling.json and scaling.png.")


@dataclasses.dataclass(frozen=True)
class Case:
  """A case to plan: a topology, and the rows and tokens per row of a step."""

  topology: str
  rows: int
  length: int

  @property
  def chips(self) -> int:
    """The number of chips of the topology."""
    rows, columns = self.topology.partition(":")[2].split("x")
    return int(rows) * int(columns)

  @property
  def arguments(self) -> list[str]:
    """The flags for `ll3m.plan`."""
    return [
      f"--topology={self.topology}",
      "--mesh_dim=-1,2,4",
      "--load_model_config=llama2_7b",
      "--update_model_config=max_positions=32768",
      "--dtype=bf16",
      "--param_dtype=bf16",
      "--remat=full",
      f"--train_dataset.seqio_dataset.batch_size={self.rows}",
      f"--train_dataset.seqio_dataset.task_feature_lengths=({self.length},)",
    ]


# The parts of a step's duration that are plotted: computation and communication.
_PARTS = ("compute", "ici")

# The cases by the quantity that varies. The number of tokens per chip is constant in the first and
# second sweep, and grows in the third.
SWEEPS = {
  "chips": [
    Case(f"v5e:{shape}", rows, 2048)
    for shape, rows in (("4x4", 16), ("4x8", 32), ("8x8", 64), ("8x16", 128), ("16x16", 256))
  ],
  "length": [Case("v5e:8x8", 131_072 // length, length) for length in (1024, 2048, 4096, 8192)],
  "rows": [Case("v5e:8x8", rows, 2048) for rows in (16, 32, 64, 128)],
}


FLAG_GROUPS = {"": SweepOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Plans and plots; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_sweep, FLAG_GROUPS, argv, doc=__doc__)


def _sweep(given: flags.Flags) -> None:
  """Plans the missing cases and plots all."""
  output = Path(given[""].output_dir)
  file = output / "scaling.json"
  plans = json.loads(file.read_text()) if file.exists() else {}
  for case in dict.fromkeys(case for cases in SWEEPS.values() for case in cases):
    key = " ".join(case.arguments)
    if key not in plans:
      print(f"planning {case}", file=sys.stderr, flush=True)
      command = [sys.executable, "-m", "ll3m.plan", *case.arguments, "--json"]
      done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
      plan = json.loads(done.stdout)
      plans[key] = {name: plan[name] for name in ("hbm_bytes", "bytes_per_chip")} | {
        "step_seconds": {part: plan["step_seconds"][part] for part in _PARTS}
      }
      file.write_text(json.dumps(plans, indent=1) + "\n")
  draw(plans, output / "scaling.png")


def draw(plans: dict[str, dict], file: Path) -> None:
  """Plots seconds per step and memory per chip for every sweep."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(2, len(SWEEPS), figsize=(11, 6), layout="constrained")
  for (name, cases), (above, below) in zip(SWEEPS.items(), axes.T, strict=True):
    x = [str(getattr(case, name)) for case in cases]
    found = [plans[" ".join(case.arguments)] for case in cases]
    for part in _PARTS:
      above.plot(x, [plan["step_seconds"][part] for plan in found], marker="o", label=part)
    bottom = [0.0] * len(cases)
    for part in ("parameters", "optimizer", "temporaries"):
      heights = [plan["bytes_per_chip"][part] / 2**30 for plan in found]
      below.bar(x, heights, bottom=bottom, label=part)
      bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    below.axhline(found[0]["hbm_bytes"] / 2**30, color="black", linestyle=":")
    above.set_title(f"over {name}")
    above.set_ylim(bottom=0)
    below.set_xlabel(name)
  axes[0, 0].set_ylabel("seconds of a step, at least")
  axes[1, 0].set_ylabel("GiB per chip")
  axes[0, 0].legend()
  axes[1, 0].legend()
  figure.savefig(file, dpi=100)


if __name__ == "__main__":
  sys.exit(main())
