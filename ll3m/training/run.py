"""Preparation of a training run, from its options to the first step."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ll3m.core import checkpoint as folders
from ll3m.core import sharding
from ll3m.core.checkpoint_manager import CheckpointerConfig
from ll3m.core.dtypes import DTYPES
from ll3m.core.model_config import ModelConfig
from ll3m.data.batch import Batch
from ll3m.data.batching import BatchIterator, open_dataset
from ll3m.data.config import DatasetConfig, TokenizerConfig
from ll3m.data.dataset_report import describe_rows, plural
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.epoch_estimate import EpochEstimate
from ll3m.data.tokenizer import Tokenizer
from ll3m.families.family import Family
from ll3m.hf.model_source import ModelOnDisk, open_source
from ll3m.hf.token_settings import retarget_settings
from ll3m.training.config import TrainOptions
from ll3m.training.evaluation import evaluate
from ll3m.training.logger import LoggerConfig, say
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.preemption import StopRequest
from ll3m.training.sharded_batches import batch_shapes, in_step
from ll3m.training.step import TrainState
from ll3m.training.train_state import StatePlan, bytes_per_device

_FEW = 20
_FEW_STEPS = "for more of them, lower batch_size or raise epochs"


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run as its options describe it, validated, without weights.

  Attributes:
    load_kind: One of `config.LOAD_KINDS` if `load_checkpoint` is given, else None.
    source: Model named by `load_checkpoint`; None for random parameters and for resumed runs.
    resumed: Step of output_dir that the run resumes from, if any.
    train_data: Training data, checked.
    eval_data: Evaluation data, checked; None for no evaluation.
    dataset_state: Position in the data to start from; {} for the start of the data.
    settings: Value of every option, for the record; see `flags.Flags.settings`.
    unfinished: Steps in output_dir that an earlier job did not finish saving.
    batches: The training data, opened to count its rows, at its start; None if it is not open yet.
    held_out: The evaluation data, opened in the same way.
    epochs: Number of passes through the training data; None if `total_steps` was given.
    estimate: Estimate of an epoch's size if `total_steps` was given; None if it is unknown.
  """

  options: TrainOptions
  optimizer: OptimizerConfig
  checkpointer: CheckpointerConfig
  logger: LoggerConfig
  train_data: DataSpec
  eval_dataset: DatasetConfig
  eval_data: DataSpec | None
  load_kind: str | None
  source: ModelOnDisk | None
  resumed: folders.Checkpoint | None
  dataset_state: Mapping[str, bytes]
  family: Family
  config: ModelConfig
  tokenizer: Tokenizer
  tokenizer_config: TokenizerConfig
  mesh: Mesh
  settings: Mapping[str, Any]
  unfinished: Sequence[int] = ()
  batches: BatchIterator | None = None
  held_out: BatchIterator | None = None
  epochs: int | None = None
  estimate: EpochEstimate | None = None

  @property
  def train_dataset(self) -> DatasetConfig:
    """Options of the training data."""
    return self.train_data.config

  def rows(self, dataset: DatasetConfig) -> list[int]:
    """Returns the rows of a dataset's batches that this process reads."""
    return sharding.local_rows(self.mesh, dataset.seqio_dataset.batch_size)

  @property
  def length(self) -> int:
    """T, tokens per row."""
    return self.train_dataset.seqio_dataset.length

  def describe(self, plan: StatePlan) -> str:
    """Returns a summary of the model, mesh, batch and state, in a few lines."""
    rows = self.train_dataset.seqio_dataset.batch_size
    steps = self.optimizer.accumulate_gradient_steps
    state_bytes = bytes_per_device(plan.state)
    mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
    return "\n".join(
      [
        f"model       {self.family.name}, {plan.count():,} parameters",
        f"mesh        {mesh} ({self.mesh.size} devices)",
        f"batch       {rows} x {steps} sequences of {self.length} tokens = "
        f"{rows * steps * self.length:,} tokens per optimizer step",
        f"state       {state_bytes / 2**30:.2f} GiB per device (parameters and optimizer)",
        *(f"{name:<11} {text}" for name, text in self._data()),
        f"steps       {self.options.total_steps:,}{self._epochs()}",
        *self._lost_updates(),
        *(f"not split   {text}" for text in sharding.unsplit(plan.params, self.mesh)),
      ]
    )

  def _data(self) -> list[tuple[str, str]]:
    if self.batches is None:
      return []
    return describe_rows(self.batches.corpus, self.train_data, self.estimate)

  def _epochs(self) -> str:
    if self.estimate is not None:
      accumulate = self.optimizer.accumulate_gradient_steps
      return f", {self.estimate.describe_steps(self.options.total_steps, accumulate)}"
    if self.epochs is None:
      return ""
    each = self.options.total_steps / self.epochs
    few = f"; {_FEW_STEPS}" if self.options.total_steps < _FEW else ""
    return f", {plural(self.epochs, 'epoch')} of {each:,.1f} steps{few}"

  def _lost_updates(self) -> list[str]:
    if DTYPES[self.options.param_dtype] != jnp.bfloat16 or self.optimizer.bf16_update != "nearest":
      return []
    return [
      "updates     rounded to the nearest bfloat16, which loses small ones (optimizer.bf16_update)"
    ]

  def batch_shapes(self, parts: int = 1) -> Batch:
    """Returns the shapes and shardings of an optimizer step's batch, [A, B, T].

    Args:
      parts: Number of parts into which micro-batches are divided: [A * parts, B / parts, T].
    """
    return batch_shapes(
      self.mesh,
      self.optimizer.accumulate_gradient_steps * parts,
      self.train_dataset.seqio_dataset.batch_size // parts,
      self.length,
    )


# Key of the number of parts of a micro-batch among the settings that are saved with a step.
PARTS = "micro_batch_parts"


def fixed_settings(
  options: TrainOptions, optimizer: OptimizerConfig, train_dataset: DatasetConfig
) -> dict[str, Any]:
  """Returns the settings that must not change within a run, which are saved with every step."""
  return {
    "optimizer.type": optimizer.type,
    "optimizer.bf16_update": optimizer.bf16_update,
    "param_dtype": jnp.dtype(DTYPES[options.param_dtype]).name,
    "train_dataset.seqio_dataset.num_shards": train_dataset.seqio_dataset.num_shards,
  }


def check_settings(saved: folders.Checkpoint, settings: Mapping[str, Any]) -> None:
  """Checks that a step can be resumed from and was saved with the run's settings.

  Raises:
    ValueError: The settings differ, or the step was saved without what resuming needs.
  """
  saved.require_resumable()
  for name, before in saved.meta.get("settings", {}).items():
    if name in settings and settings[name] != before:
      raise ValueError(
        f"cannot resume from {saved.path}: it was saved with `{name}`={before}, but this run has "
        f"{settings[name]}"
      )


class Start(NamedTuple):
  """Starting point of a run; see `Run` for the fields."""

  load_kind: str | None
  source: ModelOnDisk | None = None
  resumed: folders.Checkpoint | None = None
  dataset_state: Mapping[str, bytes] = {}
  unfinished: Sequence[int] = ()


def find_start(options: TrainOptions, output_dir: str | None, settings: Mapping[str, Any]) -> Start:
  """Opens the starting point of a run: its own latest undamaged step, or `load_checkpoint`.

  Args:
    options: Options of the run.
    output_dir: Folder of the run, which is listed once; None for no folder.
    settings: The `fixed_settings` of the run.

  Raises:
    ValueError: A checkpoint is damaged, or was saved with other settings.
    FileNotFoundError: A checkpoint does not exist.
  """
  kind, _, path = (options.load_checkpoint or "").partition("::")
  start = Start(kind or None)
  if output_dir:
    steps = folders.list_steps(output_dir)
    start = start._replace(unfinished=steps.unfinished)
    if steps.finished:
      resumed = steps.open_latest(verify=options.verify)
      if options.total_steps is None or resumed.step < options.total_steps:
        check_settings(resumed, settings)
        start = start._replace(dataset_state=resumed.dataset_state())
      return start._replace(resumed=resumed)
  if kind:
    source = open_source(options.load_checkpoint if kind == "hf" else path, verify=options.verify)
    if kind.startswith("trainstate") and source.step is None:
      raise ValueError(f"`load_checkpoint`={kind}:: needs a training run, but {path} is not one")
    if kind == "trainstate":  # the data may differ
      check_settings(source, {k: v for k, v in settings.items() if "dataset" not in k})
    start = start._replace(source=source)
  if options.load_dataset_state:
    saved = start.source
    if options.load_dataset_state != path or not isinstance(saved, folders.Checkpoint):
      saved = folders.open_checkpoint(options.load_dataset_state, verify=options.verify)
    start = start._replace(dataset_state=saved.dataset_state())
  return start


def initial_state(run: Run, plan: StatePlan) -> TrainState:
  """Creates the initial state on the devices: resumed, loaded or random.

  Raises:
    ValueError: A checkpoint does not fit the run, or is damaged.
  """
  if run.resumed is not None:
    say(f"resuming from step {run.resumed.step} in {run.logger.output_dir}")
    return run.resumed.restore_state(plan.state)
  if run.load_kind == "trainstate":
    return run.source.restore_state(plan.state)
  seed = run.options.seed
  if run.source is None:
    params = plan.init(jax.random.key(seed))
  else:
    params = run.source.load_params(dtype=plan.start_dtype, shardings=plan.param_shardings)
  # If there is no memory for the parameters, jax raises here. On CPUs, waiting for a result of
  # `start` that does not depend on them would hang instead.
  jax.block_until_ready(params)
  return plan.start(params, jax.random.key_data(jax.random.key(seed)))


def open_training_data(run: Run, data: DataSpec) -> BatchIterator:
  """Opens training data at its start."""
  return open_dataset(
    data,
    run.tokenizer,
    rows=run.rows(data.config),
    multiple=run.optimizer.accumulate_gradient_steps,
  )


def open_batches(run: Run) -> BatchIterator:
  """Opens the training data at the run's starting position; imports TensorFlow for mixtures.

  Raises:
    ValueError: The data does not match the options, or the saved position belongs to other data.
  """
  batches = run.batches or open_training_data(run, run.train_data)
  if run.dataset_state:
    batches.set_state(run.dataset_state)
  return batches


def show_batches(run: Run, batches: Any) -> None:
  """Prints the first batches of a stream as text, and restores the stream's position."""
  from ll3m.data.preview import show

  if not run.options.show_batches or jax.process_index():
    return
  state = batches.state()
  for number in range(run.options.show_batches):
    print(f"== batch {number}")
    show(next(batches), run.tokenizer)
  batches.set_state(state)


def open_held_out(run: Run) -> BatchIterator | None:
  """Opens the evaluation data; returns None if there is no evaluation.

  Raises:
    ValueError: The data does not match the options.
  """
  if run.eval_data is None:
    return None
  if run.held_out is not None:
    return run.held_out
  return open_dataset(run.eval_data, run.tokenizer, rows=run.rows(run.eval_data.config))


def held_out_evaluation(
  run: Run, stream: Any, eval_step: Callable[..., Any], stop: StopRequest
) -> Callable[[Any], dict[str, float]]:
  """Returns a function that evaluates parameters and returns a record.

  The function reads the batches once and keeps them. It raises `Stopped` between batches if a stop
  was requested.
  """

  @functools.cache
  def batches() -> list[Batch]:
    return list(itertools.islice(in_step(stream), run.options.eval_steps))

  def record(params: Any) -> dict[str, float]:
    values = evaluate(
      eval_step,
      params,
      batches(),
      steps=run.options.eval_steps,
      mesh=run.mesh,
      skipped=stream.skipped,
      on_batch=stop.check,
    )
    return {f"eval_{name}": value for name, value in values.items()}

  return record


def write_companions(run: Run) -> None:
  """Saves the run's tokenizer and the source's config files beside the checkpoints.

  The tokenizer folder must hold no other tokenizer, which might be read instead. A resumed run
  already has these files.
  """
  if jax.process_index() or run.resumed is not None:
    return
  output = epath.Path(run.logger.output_dir)
  own = run.tokenizer_config.is_checkpoints_own
  # Removes files of an earlier attempt. `save` replaces its own folder.
  for name in (folders.SOURCE, *([folders.TOKENIZER] if own else [])):
    if (output / name).exists():
      (output / name).rmtree()
  if run.source is not None:
    run.source.save_companions(output)
  if not own:
    run.tokenizer.save(output / folders.TOKENIZER)
  if run.tokenizer_config.other_path is not None:
    retarget_settings(output / folders.SOURCE, run.tokenizer)
