"""Output of a run: progress bar or lines, JSONL, TensorBoard, Weights & Biases and a plot."""

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

# Minimum time between uploads: object stores cannot append, so an upload rewrites all records.
_UPLOAD_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class LoggerConfig:
  """Options of a run's output."""

  output_dir: str | None = options.option(
    None,
    "Folder for the run's checkpoints, metrics and tokenizer. If it already holds a run, that run "
    "is resumed.",
  )
  online: bool = options.option(False, "Also log to Weights & Biases; respects WANDB_MODE.")
  project: str = options.option("ll3m", "Weights & Biases project.")
  experiment_id: str | None = options.option(
    None, "Weights & Biases run id; by default it is generated and kept in output_dir."
  )
  tensorboard: bool = options.option(True, "Write TensorBoard events to output_dir/tensorboard.")


def say(text: str) -> None:
  """Prints a line to stderr, from process 0 only."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


class Logger:
  """Writer of a run's records; use as a context manager.

  Every record is one line of metrics.jsonl and one point of each curve elsewhere. When a run
  resumes at a step, the records after that step are dropped, because those steps are run again.
  TensorBoard, Weights & Biases and the plot may fail: the first failure is reported, and the run
  continues without that output.
  """

  def __init__(
    self,
    config: LoggerConfig,
    *,
    total_steps: int,
    first_step: int,
    flag_values: Mapping[str, Any],
  ):
    """Opens all outputs and drops the records after `first_step`.

    Args:
      config: Options of the output.
      total_steps: Last step of the run.
      first_step: Step that the run starts from.
      flag_values: Values of the flags, written to flags.json.
    """
    self._quiet = jax.process_index() != 0
    self._sinks: dict[str, Callable[[int, Mapping[str, float]], None]] = {}
    self._left_out: set[str] = set()
    self._closing = contextlib.ExitStack()
    self._records: list[dict[str, Any]] = []
    self._bar = None
    self._total_steps = total_steps
    self._uploaded = 0  # number of records in the object store
    self._upload_at = 0.0
    if self._quiet:
      return
    self._dir = epath.Path(config.output_dir)
    self._dir.mkdir(parents=True, exist_ok=True)
    self._path = self._dir / METRICS
    # The steps after `first_step` are run again.
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
    """Moves the progress bar to a finished step."""
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
    """Uploads pending records; call before each save, so that a saved step has its records."""
    if not self._quiet and is_remote(self._dir) and self._uploaded < len(self._records):
      self._rewrite()

  def has(self, step: int, name: str) -> bool:
    """Returns whether a value was logged at a step; all processes must call it together.

    Args:
      step: Step of the record.
      name: Key of the value; see `docs/metrics.md`.
    """
    found = any(record["step"] == step and name in record for record in self._records)
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(found)))

  def say(self, text: str) -> None:
    """Prints a line above the progress bar, if there is one."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      say(text)

  @contextlib.contextmanager
  def _optional(self, name: str) -> Iterator[None]:
    """Disables a sink that fails, and reports its first failure."""
    try:
      yield
    except Exception as error:  # third-party libraries and their servers raise anything
      self._sinks.pop(name, None)
      if name in self._left_out:
        return
      self._left_out.add(name)
      reason = " ".join(str(error).split()) or type(error).__name__
      self.say(f"{name} is disabled from here on: {reason}")

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
      dir=None if is_remote(self._dir) else os.fspath(self._dir),  # wandb needs a local disk
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
    """Returns the Weights & Biases run id: the resumed run's, or else a new one."""
    path = self._dir / EXPERIMENT_ID
    if not (resume and path.exists()):
      path.write_text(f"{uuid.uuid4().hex[:16]}\n")
    return path.read_text().strip()

  def _show(self, step: int, record: Mapping[str, float]) -> None:
    place = f"step {step}/{self._total_steps}"
    if "eval_loss" in record:
      self.say(
        f"{place}  eval loss {record['eval_loss']:.4f}  "
        f"perplexity {record['eval_perplexity']:.2f}  accuracy {record['eval_accuracy']:.4f}"
      )
    elif "loss" not in record:
      self.say(f"{place}  no step had a finite loss and gradient")
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
        if key in record  # custom losses have no accuracy, custom optimizers no known rate
      ]
      self.say(
        f"{place}  {'  '.join(shown)}  "
        f"{record['tokens_per_second']:.0f} tokens/s  ETA {duration(remaining)}"
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
    if is_remote(self._path):  # object stores publish a file atomically
      self._path.write_text(text)
      self._uploaded = len(self._records)
      self._upload_at = time.monotonic() + _UPLOAD_SECONDS
    else:
      part = self._path.with_name(f"{METRICS}.part")
      part.write_text(text)
      part.replace(self._path)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
  """Reads a metrics.jsonl and skips an unfinished last line, which a killed run may leave."""
  path = epath.Path(path)
  records = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning("%s: skipped an unfinished line", path)
  return records


def plot_losses(records: list[dict[str, Any]], path: epath.Path) -> None:
  """Plots training and held-out loss over optimizer steps as a PNG; skipped without records."""
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


def duration(seconds: float) -> str:
  """Returns a time as hours:minutes:seconds."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
