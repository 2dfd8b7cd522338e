"""Optimizers with a warm-up and cosine schedule, and their options."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ll3m.core import options
from ll3m.core.dtypes import COMPUTED
from ll3m.training.rounding import (
  UPDATES,
  MasterState,
  cast_stochastically,
  to_float32,
  with_master,
)

# Modules whose parameters have a leading axis of layers.
_STACKED = ("layers", "rest_layers")
# Weight decay does not apply to norm weights, biases and the embedding.
_NOT_DECAYED = re.compile(r"(.*norm/.*)|(.*/(b|bias|scale))|(embed/.*)")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Options that every optimizer has."""

  lr: float = options.option(1e-4, "Peak learning rate.")
  init_lr: float = options.option(0.0, "Learning rate at the start of the warm-up.")
  end_lr: float | None = options.option(
    None, "Learning rate at and after lr_decay_steps; by default a tenth of lr."
  )
  lr_warmup_steps: int = options.option(
    0, "Number of optimizer steps of linear warm-up from init_lr to lr."
  )
  lr_warmup_fraction: float = options.option(
    0.0, "Length of the warm-up as a fraction of lr_decay_steps, instead of lr_warmup_steps."
  )
  lr_decay_steps: int | None = options.option(
    None,
    "Optimizer step at which the cosine decay reaches end_lr, counted from the start of the run; "
    "by default total_steps.",
  )
  clip_gradient: float = options.option(
    1.0, "Global norm to which larger gradients are scaled down; 0 for no clipping."
  )
  weight_decay: float = options.option(
    0.0, "Decoupled weight decay of matrices; norms, biases and embeddings are not decayed."
  )

  def __post_init__(self):
    for name in ("lr", "init_lr", "end_lr", "lr_warmup_steps", "clip_gradient", "weight_decay"):
      value = getattr(self, name)
      if value is not None and not value >= 0:
        raise ValueError(f"`{name}` must not be negative, got {value}")
    if self.end_lr is not None and self.end_lr > self.lr:
      raise ValueError(f"`end_lr` ({self.end_lr}) must not be above `lr` ({self.lr})")
    if not 0 <= self.lr_warmup_fraction < 1:
      raise ValueError(
        f"`lr_warmup_fraction` must be at least 0 and below 1, got {self.lr_warmup_fraction}"
      )
    if self.lr_warmup_fraction and self.lr_warmup_steps:
      raise ValueError(
        "`lr_warmup_fraction` cannot be combined with `lr_warmup_steps`: each is the length of the "
        "warm-up"
      )
    if self.lr_decay_steps is not None and self.lr_decay_steps <= self.lr_warmup_steps:
      raise ValueError(
        f"`lr_decay_steps` ({self.lr_decay_steps}) must be larger than `lr_warmup_steps` "
        f"({self.lr_warmup_steps}), because it includes the warm-up"
      )


@dataclasses.dataclass(frozen=True)
class AdamWConfig(ScheduleConfig):
  """AdamW (Loshchilov & Hutter, 2019)."""

  b1: float = options.option(0.9, "Decay rate of the first moment.")
  b2: float = options.option(0.95, "Decay rate of the second moment.")
  eps: float = options.option(1e-8, "Term added to the square root of the second moment.")
  weight_decay: float = options.option(
    0.1, "Decoupled weight decay of matrices; norms, biases and embeddings are not decayed."
  )
  bf16_momentum: bool = options.option(False, "Store the first moment in bfloat16.")


@dataclasses.dataclass(frozen=True)
class AdafactorConfig(ScheduleConfig):
  """Adafactor (Shazeer & Stern, 2018)."""

  multiply_by_parameter_scale: bool = options.option(
    False, "Scale each update by the root mean square of its parameter."
  )
  bf16_momentum: bool = options.option(
    False, "Use a first moment, with decay rate 0.9, stored in bfloat16."
  )


@dataclasses.dataclass(frozen=True)
class LionConfig(ScheduleConfig):
  """Lion (Chen et al., 2023)."""

  b1: float = options.option(
    0.9, "Weight of the momentum in the update's interpolation of momentum and gradient."
  )
  b2: float = options.option(0.99, "Decay rate of the momentum.")
  weight_decay: float = options.option(
    1.0, "Decoupled weight decay of matrices; norms, biases and embeddings are not decayed."
  )
  bf16_momentum: bool = options.option(False, "Store the momentum in bfloat16.")


@dataclasses.dataclass(frozen=True)
class SgdConfig(ScheduleConfig):
  """Stochastic gradient descent."""

  momentum: float = options.option(0.0, "Decay rate of the Nesterov momentum; 0 for no momentum.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Options of the optimizer and of gradient accumulation."""

  type: str = options.option(
    "adamw", "Optimizer to use.", choices=("adamw", "adafactor", "lion", "sgd")
  )
  accumulate_gradient_steps: int = options.option(
    1, "Number of micro-steps, of batch_size sequences each, per optimizer step."
  )
  accumulator_dtype: str = options.option(
    "f32", "Dtype in which micro-step gradients are accumulated.", choices=COMPUTED
  )
  bf16_update: str = options.option(
    "nearest",
    "How parameters with param_dtype=bf16 are updated. nearest: round to the nearest value, which "
    "loses updates below half a unit in the last place. stochastic: round up or down at random, "
    "with the exact mean; needs no extra memory. master: update a float32 copy, with moments in "
    "float32; needs 4 bytes per parameter for the copy and 2 more for each moment. Parameters and "
    "AdamW's state take 6, 6 and 14 bytes per parameter, respectively; 12 with param_dtype=f32.",
    choices=UPDATES,
  )
  adamw_optimizer: AdamWConfig = options.group(AdamWConfig)
  adafactor_optimizer: AdafactorConfig = options.group(AdafactorConfig)
  lion_optimizer: LionConfig = options.group(LionConfig)
  sgd_optimizer: SgdConfig = options.group(SgdConfig)

  def __post_init__(self):
    if self.accumulate_gradient_steps < 1:
      raise ValueError(
        f"`accumulate_gradient_steps` must be at least 1, got {self.accumulate_gradient_steps}"
      )

  def without_effect(self) -> dict[str, str]:
    """Returns the option groups of other optimizers, by name, with the reason for each."""
    groups = (field.name for field in dataclasses.fields(self) if field.name.endswith("_optimizer"))
    return {
      name: f"with `type`={self.type}" for name in groups if getattr(self, name) is not self.chosen
    }

  @property
  def chosen(self) -> ScheduleConfig:
    """Options of the optimizer that `type` names."""
    return getattr(self, f"{self.type}_optimizer")


def make_schedule(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates so far.

  The first update uses the schedule's value after one step, because a warm-up from 0 would waste
  it.
  """
  decay_steps = config.lr_decay_steps
  if decay_steps is None:
    decay_steps = max(total_steps, config.lr_warmup_steps + 1)
  warmup_steps = config.lr_warmup_steps or round(config.lr_warmup_fraction * decay_steps)
  end_lr = 0.1 * config.lr if config.end_lr is None else config.end_lr
  schedule = optax.warmup_cosine_decay_schedule(
    config.init_lr, config.lr, warmup_steps, decay_steps, end_lr
  )
  return lambda step: schedule(step + 1)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
  """Builds the optimizer: clipping, update rule, decoupled weight decay and learning rate.

  With `bf16_update="master"`, its state is a `MasterState`.

  Args:
    config: Options of the optimizer.
    total_steps: Last step of the run, at which the cosine decay ends by default.
  """
  chosen = config.chosen
  momentum_dtype = jnp.bfloat16 if getattr(chosen, "bf16_momentum", False) else None
  match chosen:
    case AdamWConfig():
      rule = optax.scale_by_adam(chosen.b1, chosen.b2, chosen.eps, mu_dtype=momentum_dtype)
    case LionConfig():
      rule = optax.scale_by_lion(chosen.b1, chosen.b2, mu_dtype=momentum_dtype)
    case AdafactorConfig():
      parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
      if chosen.multiply_by_parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
      if momentum_dtype is not None:
        parts.append(optax.ema(0.9, debias=False, accumulator_dtype=momentum_dtype))
      rule = _per_layer(optax.chain(*parts))
    case SgdConfig():
      rule = optax.trace(chosen.momentum, nesterov=True) if chosen.momentum else optax.identity()
  transformations = [rule]
  if chosen.clip_gradient:
    transformations.insert(0, optax.clip_by_global_norm(chosen.clip_gradient))
  if chosen.weight_decay:
    transformations.append(optax.add_decayed_weights(chosen.weight_decay, mask=decay_mask))
  transformations.append(optax.scale_by_learning_rate(make_schedule(chosen, total_steps)))
  whole = optax.chain(*transformations)
  return with_master(whole) if config.bf16_update == "master" else whole


def updates_made(opt_state: Any) -> Array:
  """Returns the schedule's count of updates, which does not include skipped steps.

  Args:
    opt_state: State of an optimizer that has a schedule.
  """
  return optax.tree_utils.tree_get(opt_state, "ScaleByScheduleState").count


def _per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies a rule to each layer of the stacked parameters separately.

  Adafactor factors the two largest axes of a parameter and divides by root mean squares over the
  whole parameter. Over stacked layers, one layer's gradient would change another layer's update.
  The state is stacked like the parameters, including the count of steps.
  """

  def split(tree):
    stacked = {module: arrays for module, arrays in tree.items() if module.startswith(_STACKED)}
    return stacked, {module: tree[module] for module in tree.keys() - stacked.keys()}

  def init(params):
    stacked, rest = split(params)
    return (jax.vmap(rule.init)(stacked) if stacked else ()), rule.init(rest)

  def update(updates, state, params):
    (stacked, rest), (stacked_params, rest_params) = split(updates), split(params)
    rest, rest_state = rule.update(rest, state[1], rest_params)
    if not stacked:
      return rest, (state[0], rest_state)
    stacked, stacked_state = jax.vmap(rule.update)(stacked, state[0], stacked_params)
    return stacked | rest, (stacked_state, rest_state)

  return optax.GradientTransformation(init, update)


def apply(
  optimizer: optax.GradientTransformation,
  gradients: Any,
  opt_state: Any,
  params: Any,
  key: Array | None = None,
) -> tuple[Any, Any]:
  """Applies one update, computed in float32 and stored in the input dtypes.

  Parameters and moments may be stored in bfloat16, but the arithmetic must be in float32: a small
  increment of a moment would be rounded away before it is added.

  Args:
    optimizer: Optimizer that `make_optimizer` built.
    gradients: Gradients, in the structure of the parameters.
    opt_state: State of the optimizer; the copy in a `MasterState` is updated instead of `params`.
    params: Parameters.
    key: Random key for stochastic rounding of parameters to bfloat16; None rounds to the nearest.

  Returns:
    (params, opt_state) after the update.
  """
  wide_params = opt_state.master if isinstance(opt_state, MasterState) else to_float32(params)
  updates, new_state = optimizer.update(to_float32(gradients), to_float32(opt_state), wide_params)
  new_params = optax.apply_updates(wide_params, updates)

  def cast_like(new, old):
    return jax.tree.map(lambda a, b: a.astype(b.dtype), new, old)

  if key is not None:
    return cast_stochastically(new_params, params, key), cast_like(new_state, opt_state)
  return cast_like(new_params, params), cast_like(new_state, opt_state)


def decay_mask(params: dict[str, dict[str, Any]]) -> dict[str, dict[str, bool]]:
  """Returns which parameters weight decay applies to."""
  return {
    module: {name: not _NOT_DECAYED.fullmatch(f"{module}/{name}") for name in arrays}
    for module, arrays in params.items()
  }


def state_shardings(
  optimizer: optax.GradientTransformation, params: Any, shardings: Any, replicated: Any
) -> Any:
  """Returns the sharding of every array of the optimizer state, which is its parameter's.

  Factored moments differ from their parameters in shape; they are small and replicated.

  Args:
    optimizer: The optimizer.
    params: Shapes of the parameters.
    shardings: Shardings of the parameters.
    replicated: Sharding of all other arrays.
  """

  def place(path, leaf):
    # The path of a moment ends like that of its parameter: module, name.
    module, name = [getattr(key, "key", None) for key in (None, None, *path)][-2:]
    param = params.get(module, {}).get(name)
    alike = param is not None and param.shape == leaf.shape
    return shardings[module][name] if alike else replicated

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
