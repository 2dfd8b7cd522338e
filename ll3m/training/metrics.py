"""From sums over tokens to the numbers that are logged."""

import math
from collections.abc import Sequence

import jax

from ll3m.core import tpu_specs
from ll3m.core.model_config import ModelConfig
from ll3m.training.loss import Sums
from ll3m.training.step import StepMetrics


def flops_per_token(config: ModelConfig, length: int) -> float:
  """Returns the FLOPs of training on one token: forward and backward, nothing recomputed.

  6 per parameter that is multiplied (Kaplan et al., 2020) and 12 T N H per layer for the scores
  and their values, halved for the causal mask (Chowdhery et al., 2022, appendix B), with the
  window in place of T where it is shorter.

  Args:
    config: the architecture.
    length: T, tokens per row.
  """
  heads = config.num_heads + 2 * config.num_kv_heads
  attention = config.d_model * config.head_dim * (heads + config.num_heads)
  feed_forward = (3 if config.gated_mlp else 2) * config.d_model * config.d_ff
  matrices = config.num_layers * (attention + feed_forward) + config.d_model * config.vocab_size
  scores = 12 * config.num_layers * config.num_heads * config.head_dim
  return 6 * matrices + scores * mean_keys(config, length)


def mean_keys(config: ModelConfig, length: int) -> float:
  """Returns how many keys a query of a row sees on average.

  That is T / 2 within the first window, then the whole window.
  """
  visible = min(length, config.sliding_window or length)
  return visible * (1 - visible / (2 * length))


def model_flop_utilisation(
  config: ModelConfig, length: int, tokens_per_second: float
) -> float | None:
  """Returns the share of the devices' peak, or None where the peak is not known."""
  chip = tpu_specs.of_device(jax.devices()[0])
  if chip is None:
    return None
  peak = chip.peak_flops * jax.device_count()
  return tokens_per_second * flops_per_token(config, length) / peak


def ratios(sums: Sums) -> dict[str, float]:
  """Returns loss, z_loss and accuracy per counted token; 0 where nothing was counted."""
  weight = max(float(sums.weight), 1.0)
  return {
    "loss": float(sums.loss) / weight,
    "z_loss": float(sums.z_loss) / weight,
    "accuracy": float(sums.correct) / weight,
  }


def add(sums: Sequence[Sums]) -> Sums:
  """Adds sums up in float64 on the host."""
  return Sums(*(sum(float(value) for value in column) for column in zip(*sums, strict=True)))


def summarise(
  steps: Sequence[StepMetrics],
  *,
  seconds: float,
  config: ModelConfig,
  length: int,
) -> dict[str, float]:
  """Joins the metrics of consecutive steps into one record.

  Args:
    steps: on the host. Losses are averaged over the tokens of all that were applied, and the
      gradient's norm is that of the last of these; those that were skipped are counted. Learning
      rate and parameters' norm are the last step's.
    seconds: that they took.
    config: the architecture.
    length: T, tokens per row.

  Returns:
    The record: see `docs/metrics.md` for its keys.
  """
  applied = [step for step in steps if not step.skipped]
  tokens = sum(float(step.sums.tokens) for step in steps)
  tokens_per_second = tokens / seconds if seconds > 0 else 0.0
  record = {
    "parameter_norm": float(steps[-1].parameter_norm),
    "skipped_steps": float(len(steps) - len(applied)),
    "tokens_per_second": tokens_per_second,
    "step_seconds": seconds / len(steps),
  }
  if not math.isnan(rate := float(steps[-1].learning_rate)):  # as it is without a schedule
    record["learning_rate"] = rate
  if applied:
    record |= ratios(add([step.sums for step in applied]))
    record["gradient_norm"] = float(applied[-1].gradient_norm)
  utilisation = model_flop_utilisation(config, length, tokens_per_second)
  return record if utilisation is None else record | {"mfu": utilisation}


def eval_record(sums: Sums, seconds: float) -> dict[str, float]:
  """Returns loss, perplexity, accuracy, counts of tokens and tokens/s of an evaluation."""
  values = ratios(sums)
  return {
    "loss": values["loss"],
    "perplexity": math.exp(min(values["loss"], 700.0)),
    "accuracy": values["accuracy"],
    "targets": float(sums.weight),
    "tokens": float(sums.tokens),
    "tokens_per_second": float(sums.tokens) / seconds if seconds > 0 else 0.0,
  }
