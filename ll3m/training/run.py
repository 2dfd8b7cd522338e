"""A training run: its options, and what lies between the flags and the first step."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ll3m.core import checkpoint as folders
from ll3m.core import flags, sharding
from ll3m.core.config import ModelConfig
from ll3m.core.dtypes import DTYPES
from ll3m.core.processes import ProcessesConfig
from ll3m.core.run import (
  CheckpointerConfig,
  Position,
  RunCheckpoints,
  require_resumable,
  restore_step,
)
from ll3m.data.batch import Batch
from ll3m.data.config import DatasetConfig, GinConfig, StrictConfig, TokenizerConfig
from ll3m.data.tokenizer import Tokenizer
from ll3m.hf.family import Family
from ll3m.hf.sources import ModelSource
from ll3m.training.evaluation import evaluate
from ll3m.training.inputs import batch_shapes, in_step
from ll3m.training.logger import LoggerConfig, say
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.profiling import parse_steps
from ll3m.training.setup import StatePlan, TrainModelOptions, bytes_per_device
from ll3m.training.step import TrainState
from ll3m.training.stopping import StopRequest

LOAD_KINDS = ("params", "trainstate", "trainstate_params", "hf")


@dataclasses.dataclass(frozen=True)
class TrainOptions(TrainModelOptions, GinConfig, StrictConfig):
  """Flags of the command itself."""

  load_checkpoint: str | None = flags.option(
    None,
    "params::PATH (parameters of a converted folder or a run), trainstate::PATH (a run's "
    "parameters, optimizer, RNG and step), trainstate_params::PATH (only its parameters), or "
    "hf::DIR (a Hugging Face folder). Random parameters by default.",
  )
  load_dataset_state: str | None = flags.option(
    None, "Take the position in the data from this run's output_dir or step folder."
  )
  total_steps: int = flags.option(10_000, "Optimizer steps of the whole run.")
  seed: int = flags.option(42, "Of the random parameters and of the data's order.")
  z_loss: float = flags.option(0.0, "Weight of the z-loss log(Z)^2.")
  log_freq: int = flags.option(10, "Optimizer steps between records.")
  save_model_freq: int = flags.option(
    0, "Optimizer steps between checkpoints; the last step is always saved."
  )
  save_milestone_freq: int = flags.option(
    0, "Checkpoints at multiples of this are never deleted; 0 for none."
  )
  max_nonfinite_steps: int = flags.option(
    5, "End the run when loss or gradient are not finite in this many steps in a row."
  )
  eval_steps: int = flags.option(0, "Batches of an evaluation; 0 for no evaluation.")
  eval_freq: int = flags.option(
    0, "Optimizer steps between evaluations; 0 for the first and last step only."
  )
  data_dir: str | None = flags.option(
    None, "Folder of the text shards, local or gs://; $LL3M_DATA_DIR or ./data by default."
  )
  profile_steps: str | None = flags.option(
    None,
    "Write a trace of these optimizer steps, FIRST:LAST, both included, to output_dir/profile, for "
    "xprof or TensorBoard.",
  )
  dry_run: bool = flags.option(
    False, "Check every flag, trace the training step and print the plan; train nothing."
  )

  def __post_init__(self):
    for name, least in (
      ("total_steps", 1),
      ("log_freq", 1),
      ("save_model_freq", 0),
      ("save_milestone_freq", 0),
      ("max_nonfinite_steps", 1),
      ("eval_steps", 0),
      ("eval_freq", 0),
      ("z_loss", 0),
    ):
      if not getattr(self, name) >= least:
        raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
    kind, _, path = (self.load_checkpoint or "").partition("::")
    if self.load_checkpoint and (kind not in LOAD_KINDS or not path):
      raise ValueError(
        f"--load_checkpoint expects one of {', '.join(f'{k}::PATH' for k in LOAD_KINDS)}, "
        f"got {self.load_checkpoint!r}"
      )
    if self.save_milestone_freq and not (
      self.save_model_freq and self.save_milestone_freq % self.save_model_freq == 0
    ):
      raise ValueError(
        f"--save_milestone_freq ({self.save_milestone_freq}) must be a multiple of "
        f"--save_model_freq ({self.save_model_freq}): milestones are checkpoints that are kept"
      )
    self.profiled()  # which checks them

  def profiled(self) -> range:
    """Returns the steps to trace."""
    return parse_steps(self.profile_steps, self.total_steps) if self.profile_steps else range(0)


# The flags of a run, by what stands before the dot in their names.
FLAG_GROUPS = {
  "": TrainOptions,
  "optimizer": OptimizerConfig,
  "checkpointer": CheckpointerConfig,
  "logger": LoggerConfig,
  "tokenizer": TokenizerConfig,
  "train_dataset": DatasetConfig,
  "eval_dataset": DatasetConfig,
  "jax_distributed": ProcessesConfig,
}


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that a run is, read from the flags and validated; no weights yet.

  Attributes:
    load_kind: one of LOAD_KINDS, if `--load_checkpoint` is used.
    source: what it names; None for random parameters, and where the run is resumed.
    resumed: the step of output_dir that the run goes on from, if there is one.
    dataset_state: the position in the data to begin at; {} for its beginning.
  """

  options: TrainOptions
  optimizer: OptimizerConfig
  checkpointer: CheckpointerConfig
  logger: LoggerConfig
  train_dataset: DatasetConfig
  eval_dataset: DatasetConfig
  load_kind: str | None
  source: ModelSource | None
  resumed: folders.Checkpoint | None
  dataset_state: Mapping[str, bytes]
  family: Family
  config: ModelConfig
  tokenizer: Tokenizer
  tokenizer_config: TokenizerConfig
  mesh: Mesh

  def rows(self, dataset: DatasetConfig) -> list[int]:
    """Returns which rows of a dataset's batches this process reads."""
    return sharding.local_rows(self.mesh, dataset.seqio_dataset.batch_size)

  @property
  def length(self) -> int:
    """T, tokens per row."""
    return self.train_dataset.seqio_dataset.length

  def settings(self) -> dict[str, Any]:
    """Returns every flag's value, for the record."""
    groups = ("optimizer", "checkpointer", "logger", "train_dataset", "eval_dataset")
    values = flags.to_dict(self.options) | flags.to_dict(self.tokenizer_config, "tokenizer")
    for name in groups:
      values |= flags.to_dict(getattr(self, name), name)
    return values

  def describe(self, plan: StatePlan) -> str:
    """Returns what will be trained on what, in a few lines."""
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
        f"steps       {self.options.total_steps}",
        *(f"not split   {text}" for text in sharding.unsplit(plan.params, self.mesh)),
      ]
    )

  def batch_shapes(self) -> Batch:
    """Returns the shapes and shardings of an optimizer step's batch, [A, B, T]."""
    return batch_shapes(
      self.mesh,
      self.optimizer.accumulate_gradient_steps,
      self.train_dataset.seqio_dataset.batch_size,
      self.length,
    )


def fixed_settings(
  options: TrainOptions, optimizer: OptimizerConfig, train_dataset: DatasetConfig
) -> dict[str, Any]:
  """Returns the flags that a run keeps and that are saved with it, to be compared at once."""
  return {
    "optimizer.type": optimizer.type,
    "param_dtype": jnp.dtype(DTYPES[options.param_dtype]).name,
    "train_dataset.seqio_dataset.num_shards": train_dataset.seqio_dataset.num_shards,
  }


def check_settings(saved: folders.Checkpoint, settings: Mapping[str, Any]) -> None:
  """Demands that a step which is to be gone on from was saved with the same settings.

  Raises:
    ValueError: it was not, or it was saved without what going on needs.
  """
  require_resumable(saved.path)
  for name, before in saved.meta.get("settings", {}).items():
    if name in settings and settings[name] != before:
      raise ValueError(
        f"cannot go on from {saved.path}: it was saved with --{name}={before}, asked for "
        f"{settings[name]}"
      )


def initial_state(run: Run, plan: StatePlan, checkpoints: RunCheckpoints) -> TrainState:
  """Makes the state of the first step on the devices: resumed, loaded or random.

  Raises:
    ValueError: a checkpoint does not fit the run, or is damaged.
  """
  like = {"params": plan.params, "opt_state": plan.state.opt_state}
  if run.resumed is not None:
    say(f"resuming from step {run.resumed.step} in {run.logger.output_dir}")
    return _state(plan, checkpoints.restore(run.resumed.step, **like))
  if run.load_kind == "trainstate":
    return _state(plan, restore_step(run.source.path, **like))
  seed = run.options.seed
  if run.source is None:
    params = plan.init(jax.random.key(seed))
  else:
    dtype = jax.tree.leaves(plan.params)[0].dtype
    params = run.source.load_params(dtype=dtype, shardings=plan.param_shardings)
  # If there was no memory for them, jax says so here; on CPUs, who asks for a result of `start`
  # that does not need them would wait for ever.
  jax.block_until_ready(params)
  return plan.start(params, jax.random.key_data(jax.random.key(seed)))


def _state(plan: StatePlan, position: Position) -> TrainState:
  everywhere = plan.state.step.sharding
  return TrainState(
    step=jax.device_put(np.int32(position.step), everywhere),
    params=position.params,
    opt_state=position.opt_state,
    rng=jax.device_put(np.asarray(position.meta["rng"], np.uint32), everywhere),
  )


def open_batches(run: Run) -> Any:
  """Opens the training data where the run begins; loads TensorFlow.

  Raises:
    ValueError: the data is not what the flags say, or the saved position is of other data.
  """
  from ll3m.data.batches import open_dataset

  batches = open_dataset(
    run.train_dataset,
    run.tokenizer,
    rows=run.rows(run.train_dataset),
    data_dir=run.options.data_dir,
    seed=run.options.seed,
    split_default="train",
    repeat=True,
    strict=run.options.strict,
  )
  if run.dataset_state:
    batches.set_state(run.dataset_state)
  return batches


def open_held_out(run: Run) -> Any:
  """Opens the evaluation data; None if there is no evaluation.

  Raises:
    ValueError: the data is not what the flags say.
  """
  from ll3m.data.batches import open_dataset

  if not run.options.eval_steps:
    return None
  return open_dataset(
    run.eval_dataset,
    run.tokenizer,
    rows=run.rows(run.eval_dataset),
    data_dir=run.options.data_dir,
    seed=run.options.seed,
    split_default="validation",
    repeat=False,
    strict=run.options.strict,
  )


def held_out_evaluation(
  run: Run, stream: Any, eval_step: Callable[..., Any], stop: StopRequest
) -> Callable[[Any], dict[str, float]]:
  """Returns parameters -> record of an evaluation; the batches are read once and kept.

  What it returns raises `Stopped` between two batches if it was asked to stop.
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
  """Puts the run's tokenizer and the source's config files beside the checkpoints.

  The folder of the tokenizer holds the run's and no other: of two, the wrong one would be read.
  A run that goes on has them already.
  """
  if jax.process_index() or run.resumed is not None:
    return
  output = epath.Path(run.logger.output_dir)
  own = run.tokenizer_config.is_checkpoints_own
  # What an earlier attempt left; `save` makes its folder anew by itself.
  for name in (folders.SOURCE, *([folders.TOKENIZER] if own else [])):
    if (output / name).exists():
      (output / name).rmtree()
  if run.source is not None:
    run.source.save_companions(output)
  if not own:
    run.tokenizer.save(output / folders.TOKENIZER)
