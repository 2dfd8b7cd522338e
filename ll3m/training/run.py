"""A training run: its options, and what lies between the flags and the first step."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ll3m.core import checkpoint as folders
from ll3m.core import flags, sharding
from ll3m.core.config import ModelConfig
from ll3m.core.run import (
  CheckpointerConfig,
  Position,
  RunCheckpoints,
  restore_dataset_state,
  restore_step,
)
from ll3m.data.batch import Batch
from ll3m.data.config import DatasetConfig, GinConfig, TokenizerConfig
from ll3m.data.tokenizer import Tokenizer
from ll3m.hf.family import Family
from ll3m.hf.sources import ModelSource
from ll3m.training.evaluation import evaluate
from ll3m.training.inputs import batch_shapes, in_step
from ll3m.training.logger import LoggerConfig, say
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.setup import StatePlan, TrainModelOptions, check_same_model
from ll3m.training.step import TrainState

LOAD_KINDS = ("params", "trainstate", "trainstate_params", "hf")


@dataclasses.dataclass(frozen=True)
class TrainOptions(TrainModelOptions, GinConfig):
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
  eval_steps: int = flags.option(0, "Batches of an evaluation; 0 for no evaluation.")
  eval_freq: int = flags.option(
    0, "Optimizer steps between evaluations; 0 for the first and last step only."
  )
  data_dir: str | None = flags.option(
    None, "Folder of the text shards, local or gs://; $LL3M_DATA_DIR or ./data by default."
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
      ("eval_steps", 0),
      ("eval_freq", 0),
      ("z_loss", 0),
    ):
      if not getattr(self, name) >= least:
        raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
    if self.save_milestone_freq and not (
      self.save_model_freq and self.save_milestone_freq % self.save_model_freq == 0
    ):
      raise ValueError(
        f"--save_milestone_freq ({self.save_milestone_freq}) must be a multiple of "
        f"--save_model_freq ({self.save_model_freq}): milestones are checkpoints that are kept"
      )


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that a run is, read from the flags and validated; no weights yet."""

  options: TrainOptions
  optimizer: OptimizerConfig
  checkpointer: CheckpointerConfig
  logger: LoggerConfig
  train_dataset: DatasetConfig
  eval_dataset: DatasetConfig
  load_kind: str | None
  source: ModelSource | None
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
    state_bytes = sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(plan.state)
    )
    mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
    return "\n".join(
      [
        f"model       {self.family.name}, {plan.count():,} parameters",
        f"mesh        {mesh} ({self.mesh.size} devices)",
        f"batch       {rows} x {steps} sequences of {self.length} tokens = "
        f"{rows * steps * self.length:,} tokens per optimizer step",
        f"state       {state_bytes / 2**30:.2f} GiB per device (parameters and optimizer)",
        f"steps       {self.options.total_steps}",
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


def initial_state(
  run: Run, plan: StatePlan, checkpoints: RunCheckpoints
) -> tuple[TrainState, dict[str, bytes]]:
  """Makes the state of the first step: resumed, loaded or random.

  Returns:
    The state on the devices, and the position in the data ({} for its beginning).

  Raises:
    ValueError: a checkpoint does not fit the run.
  """
  latest = checkpoints.latest_step()
  options = run.options
  if latest is not None:
    say(f"resuming from step {latest} in {run.logger.output_dir}")
    position = checkpoints.restore(latest, params=plan.params, opt_state=plan.state.opt_state)
    shards = run.train_dataset.seqio_dataset.num_shards
    if position.meta["num_shards"] != shards:
      raise ValueError(
        f"this run's data is split into num_shards={position.meta['num_shards']}, got {shards}"
      )
    check_same_model(run.config, ModelConfig.from_dict(position.meta["config"]))
    return _state(plan, position), position.dataset
  dataset = {}
  if options.load_dataset_state:
    dataset = restore_dataset_state(options.load_dataset_state)
  rng = jax.random.key_data(jax.random.key(options.seed))
  if run.load_kind == "trainstate":
    position = restore_step(run.source.path, params=plan.params, opt_state=plan.state.opt_state)
    return _state(plan, position), dataset
  if run.source is None:
    params = plan.init(jax.random.key(options.seed))
  else:
    dtype = jax.tree.leaves(plan.params)[0].dtype
    params = run.source.load_params(dtype=dtype, shardings=plan.param_shardings)
  return plan.start(params, rng), dataset


def _state(plan: StatePlan, position: Position) -> TrainState:
  everywhere = plan.state.step.sharding
  return TrainState(
    step=jax.device_put(np.int32(position.step), everywhere),
    params=position.params,
    opt_state=position.opt_state,
    rng=jax.device_put(np.asarray(position.meta["rng"], np.uint32), everywhere),
  )


def open_batches(run: Run) -> Any:
  """Opens the training data at its beginning; loads TensorFlow, reads nothing of a mixture yet."""
  from ll3m.data.batches import open_dataset

  return open_dataset(
    run.train_dataset,
    run.tokenizer,
    rows=run.rows(run.train_dataset),
    data_dir=run.options.data_dir,
    seed=run.options.seed,
    split_default="train",
    repeat=True,
  )


def held_out_evaluation(
  run: Run, eval_step: Callable[..., Any]
) -> Callable[[Any], dict[str, float]]:
  """Returns parameters -> record of an evaluation; the batches are read once and kept."""

  @functools.cache
  def batches() -> list[Batch]:
    from ll3m.data.batches import open_dataset

    stream = open_dataset(
      run.eval_dataset,
      run.tokenizer,
      rows=run.rows(run.eval_dataset),
      data_dir=run.options.data_dir,
      seed=run.options.seed,
      split_default="validation",
      repeat=False,
    )
    return list(itertools.islice(in_step(stream), run.options.eval_steps))

  def record(params: Any) -> dict[str, float]:
    values = evaluate(eval_step, params, batches(), steps=run.options.eval_steps, mesh=run.mesh)
    return {f"eval_{name}": value for name, value in values.items()}

  return record


def write_companions(run: Run) -> None:
  """Puts the tokenizer and the source's config files beside the checkpoints."""
  output = epath.Path(run.logger.output_dir)
  if jax.process_index() == 0:
    if run.source is not None:
      run.source.save_companions(output)
    if not run.tokenizer_config.is_checkpoints_own:
      run.tokenizer.save(output / folders.TOKENIZER)
