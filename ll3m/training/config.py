"""Options of a training run, and the groups that name their flags."""

import dataclasses

import jax.numpy as jnp

from ll3m.core import options
from ll3m.core.checkpoint_manager import CheckpointerConfig
from ll3m.core.distributed import DistributedConfig
from ll3m.core.dtypes import DTYPES
from ll3m.core.options import Fallback
from ll3m.data.config import (
  DEFAULT_SEED,
  DatasetConfig,
  GinConfig,
  StrictConfig,
  TokenizerConfig,
  short_names,
)
from ll3m.training.logger import LoggerConfig
from ll3m.training.model_choice import TrainModelOptions
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.profiling import parse_steps

DEFAULT_EPOCHS = 3
DEFAULT_STEPS = 10_000  # for data of unknown size
_UNKNOWN_STEPS = 2**31 - 1
LOAD_KINDS = ("params", "trainstate", "trainstate_params", "hf")


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """Options of the training loop: its length, and how often it logs, saves and evaluates."""

  total_steps: int = options.option(10_000, "Total number of optimizer steps in the run.")
  log_freq: int = options.option(10, "Number of optimizer steps between training records.")
  save_model_freq: int = options.option(
    0,
    "Number of optimizer steps between checkpoints; 0 disables saving by steps. save_model_minutes "
    "saves by time as well, and the last step is always saved.",
  )
  save_model_minutes: float = options.option(
    15.0,
    "Minutes from one checkpoint to the next; 0 disables saving by time. With several processes, "
    "process 0's clock decides, checked every 10 steps.",
  )
  save_milestone_freq: int = options.option(
    0,
    "Number of optimizer steps between milestones, the checkpoints that are never deleted; 0 for "
    "no milestones.",
  )
  max_nonfinite_steps: int = options.option(
    5, "Number of consecutive steps with a non-finite loss or gradient after which the run fails."
  )
  eval_steps: int = options.option(0, "Number of batches per evaluation; 0 disables evaluation.")
  eval_freq: int = options.option(
    0,
    "Number of optimizer steps between evaluations; 0 evaluates only before the first step and "
    "after the last.",
  )

  def __post_init__(self):
    for name, least in (
      ("total_steps", 1),
      ("log_freq", 1),
      ("save_model_freq", 0),
      ("save_model_minutes", 0),
      ("save_milestone_freq", 0),
      ("max_nonfinite_steps", 1),
      ("eval_steps", 0),
      ("eval_freq", 0),
    ):
      _require_least(self, name, least)
    if self.save_milestone_freq and not (
      self.save_model_freq and self.save_milestone_freq % self.save_model_freq == 0
    ):
      raise ValueError(
        f"`save_milestone_freq` ({self.save_milestone_freq}) must be a multiple of "
        f"`save_model_freq` ({self.save_model_freq}), because milestones are saved checkpoints"
      )


@dataclasses.dataclass(frozen=True)
class TrainOptions(LoopOptions, TrainModelOptions, GinConfig, StrictConfig):
  """Options of the command itself."""

  total_steps: int | None = options.option(
    None, "Total number of optimizer steps in the run. Default: what epochs amount to."
  )
  epochs: int | None = options.option(
    None,
    "Number of passes through the training data, instead of total_steps. Default: 3 for files and "
    "downloaded datasets; for mixtures and streams, whose size is unknown, total_steps is 10000.",
  )
  eval_steps: int | None = options.option(
    None,
    "Number of batches per evaluation; 0 disables evaluation. Default: all of eval_data or "
    "eval_fraction, else 0.",
  )
  eval_freq: int | None = options.option(
    None,
    "Number of optimizer steps between evaluations; 0 evaluates only before the first step and "
    "after the last. Default: an epoch with eval_data or eval_fraction, else 0.",
  )
  eval_fraction: float = options.option(
    0.0,
    "Fraction of the rows of the training data to hold out for evaluation, evenly spread; 0 for "
    "none.",
  )
  load_checkpoint: str | None = options.option(
    None,
    "Checkpoint to start from: params::PATH (parameters of a converted folder or a run), "
    "trainstate::PATH (parameters, optimizer state, RNG and step of a run), "
    "trainstate_params::PATH (parameters of a run), or hf::DIR (a Hugging Face folder). By "
    "default, parameters are random.",
  )
  load_dataset_state: str | None = options.option(
    None,
    "Run from whose position in the training data to start: its output_dir or one of its step "
    "folders.",
  )
  seed: int = options.option(
    DEFAULT_SEED, "Random seed for parameter initialisation and data order."
  )
  z_loss: float = options.option(0.0, "Weight of the z-loss, log(Z)^2.")
  data_dir: str | None = options.option(
    None, "Folder of the text shards, local or gs://; by default $LL3M_DATA_DIR or ./data."
  )
  profile_steps: str | None = options.option(
    None,
    "Optimizer steps to trace, as FIRST:LAST, both included. The trace is written to "
    "output_dir/profile, for xprof or TensorBoard.",
  )
  dry_run: bool = options.option(
    False, "Check all flags, trace the training step and print the plan without training."
  )
  show_batches: int = options.option(
    0,
    "Number of batches to print as text before the first step: their documents, their tokens and "
    "which tokens are trained on. Also works with dry_run.",
  )

  def __post_init__(self):
    super().__post_init__()
    _require_least(self, "show_batches", 0)
    _require_least(self, "z_loss", 0)
    _require_least(self, "epochs", 1)
    if self.epochs is not None and self.total_steps is not None:
      raise ValueError("`epochs` cannot be combined with `total_steps`: each is a run's length")
    kind, _, path = (self.load_checkpoint or "").partition("::")
    if self.load_checkpoint and (kind not in LOAD_KINDS or not path):
      raise ValueError(
        f"`load_checkpoint` expects one of {', '.join(f'{k}::PATH' for k in LOAD_KINDS)}, "
        f"got {self.load_checkpoint!r}"
      )
    self.profiled()  # checks `profile_steps`

  def profiled(self) -> range:
    """Returns the steps to trace."""
    if not self.profile_steps:
      return range(0)
    return parse_steps(self.profile_steps, self.total_steps or _UNKNOWN_STEPS)


def _require_least(config: LoopOptions, name: str, least: int) -> None:
  if getattr(config, name) is not None and not getattr(config, name) >= least:
    raise ValueError(f"`{name}` must be at least {least}, got {getattr(config, name)}")


# Short names of flags.
SHORT = short_names("train_dataset") | {"eval_data": "eval_dataset.data"}
# Options of a run, by the prefix of their flags' names.
FLAG_GROUPS = {
  "": TrainOptions,
  "optimizer": OptimizerConfig,
  "checkpointer": CheckpointerConfig,
  "logger": LoggerConfig,
  "tokenizer": TokenizerConfig,
  "train_dataset": DatasetConfig,
  "eval_dataset": DatasetConfig,
  "jax_distributed": DistributedConfig,
}
# Options of the evaluation data default to those of the training data, except the split, the
# shuffling and the files: held-out text must not be trained on.
FALLBACKS = {
  "eval_dataset": Fallback(
    "train_dataset",
    own=(
      "data",
      "seqio_dataset.split",
      "seqio_dataset.shuffle",
      "json_dataset",
      "huggingface_dataset.split",
    ),
  )
}


def without_effect(run: TrainOptions, *, has_eval_data: bool = False) -> dict[str, str]:
  """Returns the options that have no effect, by name, with the reason for each.

  Args:
    run: Options of the run.
    has_eval_data: Whether `eval_dataset.data` is given.
  """
  unused = {}
  if run.eval_steps == 0:
    names = ("eval_dataset", "eval_freq", "eval_fraction")
    unused |= dict.fromkeys(names, "with `eval_steps`=0")
  elif not (run.eval_steps or run.eval_fraction or has_eval_data):
    unused |= dict.fromkeys(("eval_dataset", "eval_freq"), "without `eval_steps`")
  elif run.eval_fraction:
    unused["eval_dataset"] = "with `eval_fraction`, which takes rows of the training data"
  if DTYPES[run.param_dtype] != jnp.bfloat16:
    unused["optimizer.bf16_update"] = f"with `param_dtype`={run.param_dtype}"
  return unused
