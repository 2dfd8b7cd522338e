"""Optimizers with a warm-up and cosine schedule, from their flags."""

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
_STACKED = "layers/"
# Norm weights, biases and the embedding are not pulled towards zero.
_NOT_DECAYED = re.compile(r"(.*norm/.*)|(.*/(b|bias|scale))|(embed/.*)")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Options that every optimizer has."""

  lr: float = options.option(1e-4, "Peak learning rate.")
  init_lr: float = options.option(0.0, "Learning rate from which the warm-up starts.")
  end_lr: float | None = options.option(
    None, "Learning rate at and after lr_decay_steps; a tenth of lr by default."
  )
  lr_warmup_steps: int = options.option(0, "Optimizer steps of linear warm-up from init_lr to lr.")
  lr_decay_steps: int | None = options.option(
    None,
    "Optimizer step, counted from the start, at which the cosine reaches end_lr; total_steps "
    "by default.",
  )
  clip_gradient: float = options.option(
    1.0, "Scale the gradient down to this global norm; 0 for no clipping."
  )
  weight_decay: float = options.option(
    0.0, "Decoupled weight decay of matrices (not of norms, biases and embeddings)."
  )

  def __post_init__(self):
    for name in ("lr", "init_lr", "end_lr", "lr_warmup_steps", "clip_gradient", "weight_decay"):
      value = getattr(self, name)
      if value is not None and not value >= 0:
        raise ValueError(f"`{name}` must not be negative, got {value}")
    if self.end_lr is not None and self.end_lr > self.lr:
      raise ValueError(f"`end_lr` ({self.end_lr}) must not be above `lr` ({self.lr})")
    if self.lr_decay_steps is not None and self.lr_decay_steps <= self.lr_warmup_steps:
      raise ValueError(
        f"`lr_decay_steps` ({self.lr_decay_steps}) must be larger than `lr_warmup_steps` "
        f"({self.lr_warmup_steps}): it counts from the start"
      )


@dataclasses.dataclass(frozen=True)
class AdamWConfig(ScheduleConfig):
  """AdamW (Loshchilov & Hutter, 2019)."""

  b1: float = options.option(0.9, "Decay of the first moment.")
  b2: float = options.option(0.95, "Decay of the second moment.")
  eps: float = options.option(1e-8, "Added to the root of the second moment.")
  weight_decay: float = options.option(
    0.1, "Decoupled weight decay of matrices (not of norms, biases and embeddings)."
  )
  bf16_momentum: bool = options.option(False, "Keep the first moment in bfloat16.")


@dataclasses.dataclass(frozen=True)
class AdafactorConfig(ScheduleConfig):
  """Adafactor (Shazeer & Stern, 2018)."""

  multiply_by_parameter_scale: bool = options.option(
    False, "Scale each update by its parameter's root mean square."
  )
  bf16_momentum: bool = options.option(False, "Keep a first moment (b1=0.9), in bfloat16.")


@dataclasses.dataclass(frozen=True)
class LionConfig(ScheduleConfig):
  """Lion (Chen et al., 2023)."""

  b1: float = options.option(0.9, "Decay in the update's interpolation.")
  b2: float = options.option(0.99, "Decay of the momentum.")
  weight_decay: float = options.option(
    1.0, "Decoupled weight decay of matrices (not of norms, biases and embeddings)."
  )
  bf16_momentum: bool = options.option(False, "Keep the momentum in bfloat16.")


@dataclasses.dataclass(frozen=True)
class SgdConfig(ScheduleConfig):
  """Stochastic gradient descent."""

  momentum: float = options.option(0.0, "Decay of the (Nesterov) momentum; 0 for none.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer and the accumulation of gradients."""

  type: str = options.option(
    "adamw", "Which optimizer.", choices=("adamw", "adafactor", "lion", "sgd")
  )
  accumulate_gradient_steps: int = options.option(
    1, "Micro-steps of batch_size sequences whose gradients make one optimizer step."
  )
  accumulator_dtype: str = options.option(
    "f32", "In which the micro-steps' gradients are summed.", choices=COMPUTED
  )
  bf16_update: str = options.option(
    "nearest",
    "How an update reaches parameters of param_dtype=bf16. nearest: it is rounded, and lost "
    "where it is less than half a unit in the last place. stochastic: it is rounded up or down at "
    "random, with the exact mean; takes no memory. master: it goes to a float32 copy, with moments "
    "in float32; takes 4 bytes per parameter for the copy and 2 more for each moment. Parameters "
    "and AdamW's state take 6, 6 and 14 bytes per parameter; with param_dtype=f32, 12.",
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
    """Returns the options of the optimizers that are not chosen, and why, by their names."""
    groups = (field.name for field in dataclasses.fields(self) if field.name.endswith("_optimizer"))
    return {
      name: f"with `type`={self.type}" for name in groups if getattr(self, name) is not self.chosen
    }

  @property
  def chosen(self) -> ScheduleConfig:
    """The options of the optimizer that `type` names."""
    return getattr(self, f"{self.type}_optimizer")


def make_schedule(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
  """Returns the learning rate of each optimizer step.

  The first update uses the schedule's value after one step, so that a warm-up from 0 does not
  waste it.
  """
  decay_steps = config.lr_decay_steps
  if decay_steps is None:
    decay_steps = max(total_steps, config.lr_warmup_steps + 1)
  end_lr = 0.1 * config.lr if config.end_lr is None else config.end_lr
  schedule = optax.warmup_cosine_decay_schedule(
    config.init_lr, config.lr, config.lr_warmup_steps, decay_steps, end_lr
  )
  return lambda step: schedule(step + 1)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
  """Builds the optimizer: clipping, the update rule, decoupled weight decay, learning rate.

  With `bf16_update="master"` its state is a `MasterState`.

  Args:
    config: `--optimizer.*`.
    total_steps: of the run, where the cosine ends unless told otherwise.
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
  """Returns where the schedule stands: the updates made, to which skipped steps do not count.

  Args:
    opt_state: of an optimizer that `make_optimizer` built.
  """
  return optax.tree_utils.tree_get(opt_state, "ScaleByScheduleState").count


def _per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Lets a rule for single matrices act on each layer's, where these are stacked.

  Adafactor factors the two largest axes of a parameter and divides by root mean squares over all
  of it; taken over the layers together, one layer's gradient would change another's update. The
  state is stacked as the parameters are, the count of steps included.
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
  """Makes one update, computed in float32 and stored in the dtypes that came in.

  Parameters and moments may be kept in bfloat16; their arithmetic may not: a moment's small
  increment would be rounded away before it is added.

  Args:
    optimizer: Optimizer that `make_optimizer` built.
    gradients: Gradients, like the parameters.
    opt_state: State of the optimizer; a `MasterState`'s copy is updated in place of `params`.
    params: Parameters.
    key: Random key for rounding parameters stochastically to bfloat16; to the nearest without.

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
  """Says which parameters weight decay acts on."""
  return {
    module: {name: not _NOT_DECAYED.fullmatch(f"{module}/{name}") for name in arrays}
    for module, arrays in params.items()
  }


def state_shardings(
  optimizer: optax.GradientTransformation, params: Any, shardings: Any, replicated: Any
) -> Any:
  """Returns the sharding of every array of the optimizer's state: its parameter's.

  Factored moments, which have not their parameter's shape, are small and held whole.

  Args:
    optimizer: the optimizer.
    params: the parameters' shapes.
    shardings: the parameters' shardings.
    replicated: the sharding of everything else.
  """

  def place(path, leaf):
    # A moment's path ends like its parameter's: module, name.
    module, name = [getattr(key, "key", None) for key in (None, None, *path)][-2:]
    param = params.get(module, {}).get(name)
    alike = param is not None and param.shape == leaf.shape
    return shardings[module][name] if alike else replicated

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))
