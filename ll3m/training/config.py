"""The options of a training run, and how their flags are named."""

import dataclasses

import jax.numpy as jnp

from ll3m.core import options
from ll3m.core.checkpoint_manager import CheckpointerConfig
from ll3m.core.distributed import DistributedConfig
from ll3m.core.dtypes import DTYPES
from ll3m.core.options import Fallback
from ll3m.data.config import DatasetConfig, GinConfig, StrictConfig, TokenizerConfig
from ll3m.training.logger import LoggerConfig
from ll3m.training.model_choice import TrainModelOptions
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.profiling import parse_steps

LOAD_KINDS = ("params", "trainstate", "trainstate_params", "hf")


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """How many steps a run makes, and how often the rest happens."""

  total_steps: int = options.option(10_000, "Optimizer steps of the whole run.")
  log_freq: int = options.option(10, "Optimizer steps between records.")
  save_model_freq: int = options.option(
    0,
    "Optimizer steps between checkpoints, beside those of save_model_minutes; 0 for none. The last "
    "step is always saved.",
  )
  save_model_minutes: float = options.option(
    15.0,
    "Minutes from one checkpoint to the next; 0 for none. Several processes compare process 0's "
    "clock every 10 steps.",
  )
  save_milestone_freq: int = options.option(
    0, "Checkpoints at multiples of this are never deleted; 0 for none."
  )
  max_nonfinite_steps: int = options.option(
    5, "End the run when loss or gradient are not finite in this many steps in a row."
  )
  eval_steps: int = options.option(0, "Batches of an evaluation; 0 for no evaluation.")
  eval_freq: int = options.option(
    0, "Optimizer steps between evaluations; 0 for the first and last step only."
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
        f"`save_model_freq` ({self.save_model_freq}): milestones are checkpoints that are kept"
      )


@dataclasses.dataclass(frozen=True)
class TrainOptions(LoopOptions, TrainModelOptions, GinConfig, StrictConfig):
  """Flags of the command itself."""

  load_checkpoint: str | None = options.option(
    None,
    "params::PATH (parameters of a converted folder or a run), trainstate::PATH (a run's "
    "parameters, optimizer, RNG and step), trainstate_params::PATH (only its parameters), or "
    "hf::DIR (a Hugging Face folder). Random parameters by default.",
  )
  load_dataset_state: str | None = options.option(
    None, "Take the position in the data from this run's output_dir or step folder."
  )
  seed: int = options.option(42, "Of the random parameters and of the data's order.")
  z_loss: float = options.option(0.0, "Weight of the z-loss log(Z)^2.")
  data_dir: str | None = options.option(
    None, "Folder of the text shards, local or gs://; $LL3M_DATA_DIR or ./data by default."
  )
  profile_steps: str | None = options.option(
    None,
    "Write a trace of these optimizer steps, FIRST:LAST, both included, to output_dir/profile, for "
    "xprof or TensorBoard.",
  )
  dry_run: bool = options.option(
    False, "Check every flag, trace the training step and print the plan; train nothing."
  )
  show_batches: int = options.option(
    0,
    "Print this many batches as text before the first step: their documents, tokens, and which of "
    "these are trained. Also with dry_run.",
  )

  def __post_init__(self):
    super().__post_init__()
    _require_least(self, "show_batches", 0)
    _require_least(self, "z_loss", 0)
    kind, _, path = (self.load_checkpoint or "").partition("::")
    if self.load_checkpoint and (kind not in LOAD_KINDS or not path):
      raise ValueError(
        f"`load_checkpoint` expects one of {', '.join(f'{k}::PATH' for k in LOAD_KINDS)}, "
        f"got {self.load_checkpoint!r}"
      )
    self.profiled()  # which checks them

  def profiled(self) -> range:
    """Returns the steps to trace."""
    return parse_steps(self.profile_steps, self.total_steps) if self.profile_steps else range(0)


def _require_least(config: LoopOptions, name: str, least: int) -> None:
  if not getattr(config, name) >= least:
    raise ValueError(f"`{name}` must be at least {least}, got {getattr(config, name)}")


# The options of a run, by what stands before the dot in the names of their flags.
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
# Evaluation reads what training reads, but another split, and files of its own: held-out text is
# not what is trained on.
FALLBACKS = {
  "eval_dataset": Fallback(
    "train_dataset",
    own=(
      "seqio_dataset.split",
      "seqio_dataset.shuffle",
      "json_dataset",
      "huggingface_dataset.split",
    ),
  )
}


def without_effect(run: TrainOptions) -> dict[str, str]:
  """Returns the options that others make useless, and why, by their names."""
  unused = {}
  if not run.eval_steps:
    unused |= dict.fromkeys(("eval_dataset", "eval_freq"), "without `eval_steps`")
  if DTYPES[run.param_dtype] != jnp.bfloat16:
    unused["optimizer.bf16_update"] = f"with `param_dtype`={run.param_dtype}"
  return unused
