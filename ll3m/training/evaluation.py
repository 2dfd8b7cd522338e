"""Held-out loss over a fixed number of batches."""

import itertools
import time
from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh

from ll3m.data.batch import Batch
from ll3m.data.skipped_examples import Skipped
from ll3m.models.transformer import Params
from ll3m.training import metrics
from ll3m.training.loss import Sums
from ll3m.training.sharded_batches import to_devices


def evaluate(
  eval_step: Callable[[Params, Batch], Sums],
  params: Params,
  batches: Iterable[Batch],
  *,
  steps: int,
  mesh: Mesh,
  skipped: Skipped,
  on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Evaluates parameters on held-out batches.

  Args:
    eval_step: Jitted evaluation step.
    params: Parameters of the model.
    batches: This process's rows of each batch, [b, T].
    steps: Maximum number of batches; fewer are used if the data ends first.
    mesh: Devices.
    skipped: Examples that `batches` has skipped so far.
    on_batch: Function to call after every batch.

  Returns:
    loss (nats per target token), perplexity, accuracy, targets, tokens, tokens_per_second.

  Raises:
    ValueError: There is no batch, or no batch has a target token.
  """
  start = time.perf_counter()
  sums = []
  for batch in itertools.islice(batches, steps):
    sums.append(jax.device_get(eval_step(params, to_devices(batch, mesh))))
    on_batch()
  if not sums or metrics.add(sums).weight == 0:
    why = skipped.describe()
    raise ValueError("the evaluation data has no target tokens" + (why and f"; {why}"))
  return metrics.eval_record(metrics.add(sums), time.perf_counter() - start)
