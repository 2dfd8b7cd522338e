"""The optimizer step and the evaluation step, as pure functions to be jitted.

Dimensions: A micro-steps, B sequences per micro-step, T tokens per sequence.
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
  """The state that a training step updates.

  Attributes:
    step: Number of finished optimizer steps.
    params: Parameters of the model, in the run's param_dtype.
    opt_state: State of the optimizer.
    rng: Key data from which the run's random numbers derive.
  """

  step: Int[Array, ""]
  params: Params
  opt_state: Any
  rng: UInt32[Array, "2"]


class StepMetrics(NamedTuple):
  """Metrics of a training step, float32 scalars.

  Attributes:
    sums: Sums over the tokens of the step.
    gradient_norm: Global norm of the gradient, before clipping.
    parameter_norm: Global norm of the parameters, after the update.
    learning_rate: Learning rate of the update, or of the next update if the step was skipped. NaN
      without a schedule.
    skipped: 1 if loss or gradient was not finite and nothing was updated, else 0.
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
  """Returns a training step: (state, batch [A, B, T]) -> (state, metrics).

  The gradient is that of the mean loss over all tokens of all micro-steps: each micro-step's
  summed loss is divided by the total before differentiating. Averaging the means of micro-steps,
  as `optax.MultiSteps` does, gives a different gradient if their numbers of tokens differ.

  A step with a non-finite loss or gradient leaves parameters and optimizer state unchanged, to the
  bit. (`optax.apply_if_finite` applies such an update after a number of consecutive ones.)

  Args:
    model: The decoder.
    optimizer: Any optax transformation.
    schedule: Learning rate by number of updates, for the metrics. The optimizer's state must count
      updates, as that of every optimizer with a schedule does.
    z_loss: Weight of the z-loss.
    accumulator_dtype: Dtype in which micro-step gradients are accumulated.
    stochastic_rounding: Whether to round bfloat16 parameters at random, by the state's rng and
      step.
    loss_fn: Loss to use instead of the next-token loss; the gradient is that of the sum of losses
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
      # A batch without targets has loss and gradient 0, not 0 / 0.
      total = jnp.maximum(jnp.sum(batch.mask), 1.0)
      gradients, sums = accumulate(state.params, batch, total)
    else:  # the weights are known only together with the losses
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
  """Returns an evaluation step: (params, batch [B, T]) -> sums over the tokens of the batch."""
  return lambda params, batch: token_sums(model, params, batch)


def init_state(
  params: Params, optimizer: optax.GradientTransformation, rng: UInt32[Array, "2"]
) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), rng)


def _norm(tree: Any) -> Array:
  return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
