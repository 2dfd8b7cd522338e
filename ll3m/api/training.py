"""Training steps and evaluation of a `Model` for custom loops with any optax optimizer."""

import functools
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ll3m.api.model import Model
from ll3m.data.batch import Batch
from ll3m.models.transformer import Params
from ll3m.training import metrics, step
from ll3m.training.step import StepMetrics, TrainState

Metrics = dict[str, jax.Array]


def init_state(
  params: Params, optimizer: optax.GradientTransformation, *, seed: int = 0
) -> TrainState:
  """Returns the state before the first step.

  Args:
    params: The parameters to train, such as `model.params`; they are copied.
    optimizer: Any optax transformation.
    seed: Random seed of the training state.
  """
  return step.init_state(
    # Copy, because a jitted step that donates its state would delete the model's own arrays.
    jax.tree.map(jnp.copy, params), optimizer, jax.random.key_data(jax.random.key(seed)),
  )  # fmt: skip


def make_train_step(
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  loss_fn: Callable[[Model, Params, Batch], tuple[jax.Array, jax.Array]] | None = None,
  accumulate: int = 1,
  schedule: optax.Schedule | None = None,
  z_loss: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the training step, a function (state, batch) -> (state, metrics) to be jitted.

  A step whose loss or gradient is not finite changes neither parameters nor optimizer.

  Args:
    model: The model; the step takes parameters from the state, not from the model.
    optimizer: Any optax transformation.
    loss_fn: Function (model, params, batch) -> (sum of losses, sum of their weights), both scalars;
      the step follows the gradient of their quotient. By default the next-token loss in nats.
    accumulate: Number A of micro-batches per step. A batch is [B, T] if A is 1, else [A, B, T], and
      the step follows the gradient of the mean over all tokens.
    schedule: Function from the number of updates to the learning rate, for reports only.
    z_loss: Weight of the z-loss log(Z)^2 in the default loss.

  Returns:
    The training step. Its metrics are float32 scalars: `loss` (mean per target), `targets`,
    `tokens`, `grad_norm` (before the optimizer clips it), `param_norm`, `skipped` (1 for a step
    that is not finite), `learning_rate` if there is a schedule, and `accuracy` for the default
    loss.

  Raises:
    ValueError: `accumulate` is less than 1.
  """
  if accumulate < 1:
    raise ValueError(f"accumulate must be at least 1, got {accumulate}")
  inner_loss = None if loss_fn is None else functools.partial(loss_fn, model)
  inner = step.make_train_step(
    model.decoder, optimizer, schedule, z_loss=z_loss, loss_fn=inner_loss
  )

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    shape = np.shape(batch.inputs)
    if len(shape) != 2 + (accumulate > 1) or (accumulate > 1 and shape[0] != accumulate):
      expected = "[B, T]" if accumulate == 1 else f"[{accumulate}, B, T]"
      raise ValueError(f"with accumulate={accumulate} a batch must be {expected}, got {shape}")
    micro_batches = batch if accumulate > 1 else jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    state, found = inner(state, micro_batches)
    return state, _report(found, is_default=loss_fn is None, has_schedule=schedule is not None)

  return train_step


def _report(found: StepMetrics, *, is_default: bool, has_schedule: bool) -> Metrics:
  sums = found.sums
  weight = jnp.maximum(sums.weight, 1e-9)
  report = {
    "loss": sums.loss / weight,
    "targets": sums.weight,
    "tokens": sums.tokens,
    "grad_norm": found.gradient_norm,
    "param_norm": found.parameter_norm,
    "skipped": found.skipped,
  }
  if is_default:
    report["accuracy"] = sums.correct / weight
  if has_schedule:
    report["learning_rate"] = found.learning_rate
  return report


def evaluate(
  model: Model, batches: Iterable[Batch], *, steps: int | None = None
) -> dict[str, float]:
  """Measures the next-token loss of a model on held-out batches.

  Args:
    model: The model.
    batches: Batches of [B, T], for example `ll3m.data.jsonl(..., shuffle=False, repeat=False)`.
    steps: Maximum number of batches to read; None for all.

  Returns:
    `loss` (nats per target), `perplexity`, `accuracy`, `targets`, `tokens` and
    `tokens_per_second`.

  Raises:
    ValueError: There is no batch, or no batch has a target.
  """
  eval_step = jax.jit(step.make_eval_step(model.decoder))
  sums, start = [], time.perf_counter()
  for number, batch in enumerate(batches):
    if number == steps:
      break
    sums.append(jax.device_get(eval_step(model.params, batch)))
  if not sums or metrics.add(sums).weight == 0:
    raise ValueError("the evaluation batches have no target tokens")
  return metrics.eval_record(metrics.add(sums), time.perf_counter() - start)
