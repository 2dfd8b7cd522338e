"""Training and evaluating a `Model` with any optax optimizer, in a loop of one's own."""

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
    params: The parameters to train, as `model.params`; `make_train_step` updates copies of them.
    optimizer: Any optax transformation.
    seed: Seed of what is drawn while training.
  """
  return step.init_state(
    # A jitted step that donates its state would otherwise delete the model's own arrays.
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
  """Returns a function (state, batch) -> (state, metrics), to be jitted.

  A step whose loss or gradient is not finite changes neither parameters nor optimizer.

  Args:
    model: The model; its parameters are taken from the state, not from here.
    optimizer: Any optax transformation.
    loss_fn: (model, params, batch) -> (sum of the losses, sum of their weights), both scalars; the
      gradient is that of their quotient. By default the next-token loss in nats.
    accumulate: A, micro-batches of a step. With 1, a batch is [B, T]; with more it is [A, B, T],
      and the gradient is that of the mean over all their tokens.
    schedule: The optimizer's learning rate by number of updates, to be reported.
    z_loss: Weight of the z-loss log(Z)^2 of the default loss.

  Returns:
    The step. Its metrics are float32 scalars: `loss` (mean per target), `targets`, `tokens`,
    `grad_norm` (before the optimizer clips it), `param_norm`, `skipped` (1 for a step that is not
    finite), `learning_rate` with a schedule, and with the default loss `accuracy`.

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
      raise ValueError(f"a batch with accumulate={accumulate} must be {expected}, got {shape}")
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
    batches: Batches of [B, T], as `ll3m.data.jsonl(..., shuffle=False, repeat=False)` gives them.
    steps: How many of them to read; all by default.

  Returns:
    `loss` (nats per target), `perplexity`, `accuracy`, `targets`, `tokens` and
    `tokens_per_second`.

  Raises:
    ValueError: there is no batch, or no target in any.
  """
  eval_step = jax.jit(step.make_eval_step(model.decoder))
  sums, start = [], time.perf_counter()
  for number, batch in enumerate(batches):
    if number == steps:
      break
    sums.append(jax.device_get(eval_step(model.params, batch)))
  if not sums or metrics.add(sums).weight == 0:
    raise ValueError("the evaluation batches hold no token to predict")
  return metrics.eval_record(metrics.add(sums), time.perf_counter() - start)
