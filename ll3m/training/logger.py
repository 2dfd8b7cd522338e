"""What a run shows while it runs and leaves behind: bar or lines, JSONL, TensorBoard, W&B, plot."""

import contextlib
import dataclasses
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from ll3m.core import options
from ll3m.core.object_store import is_remote

METRICS = "metrics.jsonl"
CURVE = "loss.png"
FLAGS = "flags.json"
EXPERIMENT_ID = "wandb_id"

# Object stores cannot append: there, all records are written anew, and no more often than this.
_UPLOAD_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class LoggerConfig:
  """What a run shows and writes."""

  output_dir: str | None = options.option(
    None, "Folder of the run: checkpoints, metrics, tokenizer. Resumes if it holds a run."
  )
  online: bool = options.option(False, "Also log to Weights & Biases (WANDB_MODE is respected).")
  project: str = options.option("ll3m", "Project in Weights & Biases.")
  experiment_id: str | None = options.option(
    None, "Run id in Weights & Biases; by default one that is made up and kept in output_dir."
  )
  tensorboard: bool = options.option(True, "Write TensorBoard events to output_dir/tensorboard.")


def say(text: str) -> None:
  """Prints a line for the person at the keyboard, on stderr, from the main process only."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


class Logger:
  """Writes the records of a run; use as a context manager.

  Every record is one line of metrics.jsonl and one point of each curve elsewhere. When a run
  resumes at a step, the records after it are dropped: they will be made again. What only shows the
  records elsewhere (TensorBoard, Weights & Biases, the plot) may fail: that is said once, and the
  run goes on without it.
  """

  def __init__(
    self,
    config: LoggerConfig,
    *,
    total_steps: int,
    first_step: int,
    flag_values: Mapping[str, Any],
  ):
    """Args: options; the run's last and first step; the flags' values, for the record."""
    self._quiet = jax.process_index() != 0
    self._sinks: dict[str, Callable[[int, Mapping[str, float]], None]] = {}
    self._left_out: set[str] = set()
    self._closing = contextlib.ExitStack()
    self._records: list[dict[str, Any]] = []
    self._bar = None
    self._total_steps = total_steps
    self._uploaded = 0  # how many records an object store has
    self._upload_at = 0.0
    if self._quiet:
      return
    self._dir = epath.Path(config.output_dir)
    self._dir.mkdir(parents=True, exist_ok=True)
    self._path = self._dir / METRICS
    # Records after the step that the run resumes at will be made again.
    self._records = [r for r in read_metrics(self._path) if 0 < first_step >= r["step"]]
    self._rewrite()
    (self._dir / FLAGS).write_text(json.dumps(dict(flag_values), indent=2) + "\n")
    if config.tensorboard:
      with self._optional("TensorBoard"):
        self._open_tensorboard(first_step)
    if config.online:
      with self._optional("Weights & Biases"):
        self._open_wandb(config, flag_values, resume=first_step > 0)
    if sys.stderr.isatty():
      self._bar = tqdm(
        total=total_steps,
        initial=first_step,
        desc="first step",
        unit="step",
        dynamic_ncols=True,
        file=sys.stderr,
      )
      self._closing.callback(self._bar.close)

  def __enter__(self) -> "Logger":
    return self

  def __exit__(self, *exception: Any) -> None:
    if not self._quiet:
      self.flush()
      with self._optional("the plot"):
        plot_losses(self._records, self._dir / CURVE)
    self._closing.close()

  def advance(self, step: int) -> None:
    """Moves the progress bar to a step that is finished."""
    if self._bar is not None:
      self._bar.set_description_str(refresh=False)
      self._bar.update(step - self._bar.n)

  def log(self, step: int, record: Mapping[str, float]) -> None:
    """Writes a record to every sink."""
    if self._quiet:
      return
    self._records.append({"step": step} | dict(record))
    self._append(self._records[-1])
    for name, sink in list(self._sinks.items()):
      with self._optional(name):
        sink(step, record)
    self._show(step, record)

  def flush(self) -> None:
    """Writes the records that are not written yet: before a step is saved that comes after them."""
    if not self._quiet and is_remote(self._dir) and self._uploaded < len(self._records):
      self._rewrite()

  def has(self, step: int, name: str) -> bool:
    """Says whether a value was logged at a step; all processes have to ask, and are told the same.

    Args:
      step: of the record.
      name: key of the value, as in `docs/metrics.md`.
    """
    found = any(record["step"] == step and name in record for record in self._records)
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(found)))

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      say(text)

  @contextlib.contextmanager
  def _optional(self, name: str) -> Iterator[None]:
    """Goes on without a sink that fails, and says so the first time."""
    try:
      yield
    except Exception as error:  # whatever a foreign library or its server makes of it
      self._sinks.pop(name, None)
      if name in self._left_out:
        return
      self._left_out.add(name)
      reason = " ".join(str(error).split()) or type(error).__name__
      self.say(f"{name} is left out from here on: {reason}")

  def _open_tensorboard(self, first_step: int) -> None:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(
      os.fspath(self._dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
    )

    def log(step: int, record: Mapping[str, float]) -> None:
      for name, value in record.items():
        writer.add_scalar(name, value, step)

    self._add_sink("TensorBoard", log, writer.close)

  def _open_wandb(
    self, config: LoggerConfig, flag_values: Mapping[str, Any], *, resume: bool
  ) -> None:
    import wandb

    run = wandb.init(
      project=config.project,
      id=config.experiment_id or self._experiment_id(resume=resume),
      resume="allow",
      dir=None if is_remote(self._dir) else os.fspath(self._dir),  # it writes to local disks only
      config=dict(flag_values),
    )
    self._add_sink(
      "Weights & Biases", lambda step, record: run.log(dict(record), step=step), run.finish
    )

  def _add_sink(
    self, name: str, log: Callable[[int, Mapping[str, float]], None], close: Callable[[], None]
  ) -> None:
    def close_safely() -> None:
      with self._optional(name):
        close()

    self._sinks[name] = log
    self._closing.callback(close_safely)

  def _experiment_id(self, *, resume: bool) -> str:
    """Returns the run's id in Weights & Biases: a new one, or that of the run that is resumed."""
    path = self._dir / EXPERIMENT_ID
    if not (resume and path.exists()):
      path.write_text(f"{uuid.uuid4().hex[:16]}\n")
    return path.read_text().strip()

  def _show(self, step: int, record: Mapping[str, float]) -> None:
    if "eval_loss" in record:
      self.say(
        f"step {step}/{self._total_steps}  eval loss {record['eval_loss']:.4f}  "
        f"perplexity {record['eval_perplexity']:.2f}  accuracy {record['eval_accuracy']:.4f}"
      )
    elif "loss" not in record:
      self.say(f"step {step}/{self._total_steps}  no step had a finite loss and gradient")
    elif self._bar is not None:
      self._bar.set_postfix_str(
        f"loss {record['loss']:.4f}, {record['tokens_per_second']:.0f} tokens/s"
      )
    else:
      remaining = (self._total_steps - step) * record["step_seconds"]
      shown = [
        f"{name} {record[key]:{form}}"
        for name, key, form in (
          ("loss", "loss", ".4f"),
          ("accuracy", "accuracy", ".4f"),
          ("lr", "learning_rate", ".3g"),
          ("grad norm", "gradient_norm", ".3f"),
        )
        if key in record  # a loss of one's own has no accuracy, an optimizer no known rate
      ]
      self.say(
        f"step {step}/{self._total_steps}  {'  '.join(shown)}  "
        f"{record['tokens_per_second']:.0f} tokens/s  ETA {_duration(remaining)}"
      )

  def _append(self, record: Mapping[str, Any]) -> None:
    if is_remote(self._path):
      if time.monotonic() >= self._upload_at:
        self._rewrite()
    else:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")

  def _rewrite(self) -> None:
    text = "".join(json.dumps(record) + "\n" for record in self._records)
    if is_remote(self._path):  # there, a file appears at once
      self._path.write_text(text)
      self._uploaded = len(self._records)
      self._upload_at = time.monotonic() + _UPLOAD_SECONDS
    else:
      part = self._path.with_name(f"{METRICS}.part")
      part.write_text(text)
      part.replace(self._path)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl; an unfinished last line, as a killed run leaves it, is left out."""
  path = epath.Path(path)
  records = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning("%s: left out an unfinished line", path)
  return records


def plot_losses(records: list[dict[str, Any]], path: epath.Path) -> None:
  """Draws training and held-out loss over optimizer steps as a PNG, if there are any."""
  if not records:
    return
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
    points = [(r["step"], r[key]) for r in records if key in r]
    if points:
      axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1)
  axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
  axes.grid(alpha=0.3)
  axes.legend()
  with path.open("wb") as file:
    figure.savefig(file, format="png", dpi=120)
  pyplot.close(figure)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
