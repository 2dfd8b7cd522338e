"""Prints docs/families.md, the table of presets, and plans on which machine each can be trained.

  python tools/family_docs.py > docs/families.md
  python tools/family_docs.py --plan           adds missing plans to docs/families.json first

A plan compiles a training step with the TPU compiler, on ever larger machines until it fits: a few
minutes per preset. Plans that docs/families.json already contains are not made again.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: libtpu must not look for chips

from ll3m import families, plan
from ll3m.core import flags, options
from ll3m.core.model_config import ModelConfig
from ll3m.families.tensor_rules import parameter_shapes
from ll3m.planning import training_plan

FILE = Path(__file__).parents[1] / "docs" / "families.json"
# v5e slices with 16 GB per chip, from one chip to a pod.
MACHINES = tuple(
  f"v5e:{size}" for size in ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
)
_CHIP_BYTES = 16e9
# Parameters, gradients and both moments of AdamW in float32; activations come on top.
_BYTES_PER_PARAMETER = 16
LENGTH = 2048
HEAD = f"""# Families and presets

<!-- Written by tools/family_docs.py: change the families' modules, and run it again. -->

`--load_model_config=NAME`, `--model=NAME` and `ll3m.init(NAME)` accept a preset, or the name of the
model on the Hugging Face Hub, in any case and with or without organisation and `-Instruct`:
`meta-llama/Llama-3.2-1B-Instruct` is `llama3.2_1b`. Files need no preset: any `config.json` of
these families is read, and a setting that LL3M does not support is refused by name.

- *Heads* are query heads / KV heads x head dim. *Context* is in tokens.
- *Weights* is the size of the parameters in bfloat16.
- *Full training* is the smallest TPU v5e slice (16 GB per chip) on which `ll3m.plan` fits a
  training step of one row of {LENGTH:,} tokens per chip: parameters and AdamW in float32, bfloat16
  activations, `--remat=full`, sharded over all chips (`--mesh_dim=1,-1,1`), and the memory per chip
  that it needs there. No plan was made yet where the column is empty.

```sh
python -m ll3m.convert --checkpoint_dir=DOWNLOADED_FOLDER --output_dir=models/NAME
python -m ll3m.train --load_checkpoint=params::models/NAME --data=FILES \\
  --dtype=bf16 --remat=full --mesh_dim=1,-1,1
```"""


@dataclasses.dataclass(frozen=True)
class DocsOptions:
  """Flags of the tool."""

  plan: bool = options.option(False, "Make the missing plans first.")
  presets: str = options.option("", "Presets to plan, separated by commas; all by default.")


FLAG_GROUPS = {"": DocsOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the page; see `flags.call` for `argv` and the exit code that it returns."""
  return flags.call(_run, FLAG_GROUPS, argv, doc=__doc__)


def _run(given: flags.Flags) -> None:
  if given[""].plan:
    plan_missing(tuple(filter(None, given[""].presets.split(","))) or tuple(families.PRESETS))
  print(page(json.loads(FILE.read_text()) if FILE.exists() else {}))


def plan_missing(names: Sequence[str]) -> None:
  """Adds the plans of presets to the file, each on the smallest machine that it fits on."""
  plans = json.loads(FILE.read_text()) if FILE.exists() else {}
  for name in names:
    if name in plans:
      continue
    least = _BYTES_PER_PARAMETER * count(name) / _CHIP_BYTES
    for machine in (m for m in MACHINES if chips(m) >= least):
      print(f"planning {name} on {machine}", file=sys.stderr, flush=True)
      if (needed := _plan(name, machine)) is not None:
        plans[name] = {"machine": machine, "bytes_per_chip": needed}
        FILE.write_text(json.dumps(plans, indent=1) + "\n")
        break


def _plan(name: str, machine: str) -> dict[str, int] | None:
  """Returns the bytes per chip of a training step; None if it does not fit."""
  arguments = [
    f"--load_model_config={name}", f"--topology={machine}", "--mesh_dim=1,-1,1", "--dtype=bf16",
    "--remat=full", f"--batch_size={chips(machine)}", f"--max_length={LENGTH}",
  ]  # fmt: skip
  given = flags.Flags(plan.FLAG_GROUPS, arguments, fallbacks=plan.FALLBACKS, short=plan.SHORT)
  found = training_plan.plan_training(plan.read_job(given))
  return found.bytes_per_chip if found.fits else None


def chips(machine: str) -> int:
  """Returns the number of chips of a slice."""
  rows, columns = machine.partition(":")[2].split("x")
  return int(rows) * int(columns)


def count(name: str) -> int:
  """Returns the number of parameters of a preset."""
  family, config = families.get_preset(name)
  return sum(map(math.prod, parameter_shapes(family.rules, config).values()))


def page(plans: dict[str, dict]) -> str:
  """Returns the page, without the last line break.

  Args:
    plans: Machine and bytes per chip by preset.
  """
  parts = [HEAD]
  for family in families.FAMILIES.values():
    title = (sys.modules[_module(family)].__doc__ or "").splitlines()[0].rstrip(".")
    lines = [
      f"## {title}",
      "",
      f"`model_type` {family.model_type}.",
      "",
      "| preset | parameters | weights | layers | model / feed-forward | heads | vocabulary | "
      "context | full training |",
      "|---|---|---|---|---|---|---|---|---|",
      *(_row(name, config, plans.get(name)) for name, config in family.presets.items()),
    ]
    parts.append("\n".join(lines))
  return "\n\n".join(parts)


def _module(family: families.Family) -> str:
  """Returns the name of the module that defines a family."""
  return next(
    name
    for name, module in sys.modules.items()
    if name.startswith("ll3m.families.") and family in vars(module).values()
  )


def _row(name: str, config: ModelConfig, planned: dict | None) -> str:
  number = count(name)
  heads = f"{config.num_heads} / {config.num_kv_heads} x {config.head_dim}"
  context = f"{config.max_positions:,}"
  window = config.sliding_window
  if window is not None and window < config.max_positions:
    share = sum(kind.window is not None for kind in config.layer_kinds)
    of_layers = "" if share == config.num_layers else f" in {share} layers"
    context += f", window {window:,}{of_layers}"
  training = ""
  if planned is not None:
    needed = sum(size for part, size in planned["bytes_per_chip"].items() if part != "headroom")
    training = f"{planned['machine']}, {needed / 1e9:.1f} GB per chip"
  cells = (
    f"`{name}`",
    f"{number:,}",
    f"{2 * number / 1e9:.1f} GB",
    str(config.num_layers),
    f"{config.d_model} / {config.d_ff}",
    heads,
    f"{config.vocab_size:,}{', tied' if config.tie_embeddings else ''}",
    context,
    training,
  )
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  sys.exit(main())
