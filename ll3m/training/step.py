"""One optimizer step and one evaluation step, as pure functions to be jitted.

Dimensions: A micro-steps, B sequences per micro-step, T length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt32

from ll3m.data.batch import Batch
from ll3m.models.transformer import Model, Params
from ll3m.training.loss import Sums, token_sums
from ll3m.training.optimizer import apply, updates_made


class TrainState(NamedTuple):
  """Everything that a step changes.

  Attributes:
    step: optimizer steps done.
    params: of the model, in the run's param_dtype.
    opt_state: of the optimizer.
    rng: key data from which this run's random numbers derive.
  """

  step: Int[Array, ""]
  params: Params
  opt_state: Any
  rng: UInt32[Array, "2"]


class StepMetrics(NamedTuple):
  """What a training step reports, float32 scalars.

  Attributes:
    sums: over the step's tokens.
    gradient_norm: global norm, before clipping.
    parameter_norm: global norm, after the update.
    learning_rate: that the update used; of a step that was skipped, that the next one will use.
      NaN without a schedule.
    skipped: 1 if loss or gradient were not finite and nothing was updated, else 0.
  """

  sums: Sums
  gradient_norm: Float[Array, ""]
  parameter_norm: Float[Array, ""]
  learning_rate: Float[Array, ""]
  skipped: Float[Array, ""]


# (params, batch [B, T]) -> (sum of the losses, sum of their weights).
LossFunction = Callable[[Params, Batch], tuple[Array, Array]]


def make_train_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule | None = None,
  *,
  z_loss: float = 0.0,
  accumulator_dtype: Any = jnp.float32,
  stochastic_rounding: bool = False,
  loss_fn: LossFunction | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
  """Returns (state, batch [A, B, T]) -> (state, metrics).

  The gradient is that of the mean loss over all tokens of all micro-steps: each micro-step's
  summed loss is divided by the total before differentiating. Averaging the micro-steps' means, as
  `optax.MultiSteps` does, gives another gradient when they hold different numbers of tokens.

  A step whose loss or gradient is not finite leaves parameters and optimizer as they are, to the
  bit. (`optax.apply_if_finite` applies such an update after a number of them.)

  Args:
    model: the decoder.
    optimizer: any optax transformation.
    schedule: its learning rate by number of updates, for the metrics; the optimizer's state must
      count them, as that of every optimizer with a schedule does.
    z_loss: weight of the z-loss.
    accumulator_dtype: in which the micro-steps' gradients are summed.
    stochastic_rounding: Whether bfloat16 parameters are rounded at random, from the state's rng and
      step.
    loss_fn: another loss than that of the next token; the gradient is that of the sum of losses
      over the sum of weights.
  """

  if loss_fn is None:

    def loss(params, micro_batch, total):
      sums = token_sums(model, params, micro_batch, z_loss=z_loss)
      return (sums.loss + sums.z_loss) / total, sums

  else:

    def loss(params, micro_batch, total):
      found, weight = loss_fn(params, micro_batch)
      sums = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
      tokens = jnp.sum(micro_batch.segment_ids != 0).astype(jnp.float32)
      return found / total, sums._replace(loss=found, weight=weight, tokens=tokens)

  gradient_of = jax.grad(loss, has_aux=True)

  def accumulate(params, batch, total):
    if batch.inputs.shape[0] == 1:
      return gradient_of(params, jax.tree.map(lambda x: x[0], batch), total)

    def micro_step(carry, micro_batch):
      gradients, sums = gradient_of(params, micro_batch, total)
      added = jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (gradients, sums))
      return added, None

    zeros = (
      jax.tree.map(lambda p: jnp.zeros(p.shape, accumulator_dtype), params),
      Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields)),
    )
    return jax.lax.scan(micro_step, zeros, batch)[0]

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    if loss_fn is None:
      # A batch without a single target has no loss and no gradient, not 0 / 0.
      total = jnp.maximum(jnp.sum(batch.mask), 1.0)
      gradients, sums = accumulate(state.params, batch, total)
    else:  # whose weights are known only with its losses
      gradients, sums = accumulate(state.params, batch, 1.0)
      scale = 1 / jnp.where(sums.weight == 0, 1.0, sums.weight)
      gradients = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    gradient_norm = _norm(gradients)
    finite = jnp.isfinite(gradient_norm) & jnp.isfinite(sums.loss + sums.z_loss)
    key = None
    if stochastic_rounding:
      key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    updated = apply(optimizer, gradients, state.opt_state, state.params, key)
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), updated, (state.params, state.opt_state)
    )
    metrics = StepMetrics(
      sums=sums,
      gradient_norm=gradient_norm,
      parameter_norm=_norm(params),
      learning_rate=jnp.float32(
        jnp.nan if schedule is None else schedule(updates_made(state.opt_state))
      ),
      skipped=1.0 - finite.astype(jnp.float32),
    )
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics

  return step


def make_eval_step(model: Model) -> Callable[[Params, Batch], Sums]:
  """Returns (params, batch [B, T]) -> sums over the batch's tokens."""
  return lambda params, batch: token_sums(model, params, batch)


def init_state(
  params: Params, optimizer: optax.GradientTransformation, rng: UInt32[Array, "2"]
) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), rng)


def _norm(tree: Any) -> Array:
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
