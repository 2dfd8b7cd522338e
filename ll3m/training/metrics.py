"""Conversion of sums over tokens to logged metrics."""

import math
from collections.abc import Sequence

import jax

from ll3m.core import tpu_specs
from ll3m.core.model_config import ModelConfig
from ll3m.training.loss import Sums
from ll3m.training.step import StepMetrics


def flops_per_token(config: ModelConfig, length: int) -> float:
  """Returns the FLOPs of training on one token: forward and backward, without recomputation.

  These are 6 per multiplied parameter (Kaplan et al., 2020), and 12 T N H per layer for the
  attention scores and the weighted values, halved for the causal mask (Chowdhery et al., 2022,
  appendix B). A window shorter than T replaces T.

  Args:
    config: The architecture.
    length: T, tokens per row.
  """
  heads = config.num_heads + 2 * config.num_kv_heads
  attention = config.d_model * config.head_dim * (heads + config.num_heads)
  feed_forward = (3 if config.gated_mlp else 2) * config.d_model * config.d_ff
  matrices = config.num_layers * (attention + feed_forward) + config.d_model * config.vocab_size
  keys = sum(mean_keys(kind.window, length) for kind in config.layer_kinds)
  return 6 * matrices + 12 * config.num_heads * config.head_dim * keys


def mean_keys(window: int | None, length: int) -> float:
  """Returns the average number of keys that a query of a row attends to in one layer.

  Queries within the first window attend to half a window on average, later ones to all of it.
  """
  visible = min(length, window or length)
  return visible * (1 - visible / (2 * length))


def model_flop_utilisation(
  config: ModelConfig, length: int, tokens_per_second: float
) -> float | None:
  """Returns the model FLOPs as a fraction of the devices' peak; None if the peak is unknown."""
  chip = tpu_specs.of_device(jax.devices()[0])
  if chip is None:
    return None
  peak = chip.peak_flops * jax.device_count()
  return tokens_per_second * flops_per_token(config, length) / peak


def ratios(sums: Sums) -> dict[str, float]:
  """Returns loss, z_loss and accuracy per target token; 0 without target tokens."""
  weight = max(float(sums.weight), 1.0)
  return {
    "loss": float(sums.loss) / weight,
    "z_loss": float(sums.z_loss) / weight,
    "accuracy": float(sums.correct) / weight,
  }


def add(sums: Sequence[Sums]) -> Sums:
  """Adds up sums in float64 on the host."""
  return Sums(*(sum(float(value) for value in column) for column in zip(*sums, strict=True)))


def summarise(
  steps: Sequence[StepMetrics],
  *,
  seconds: float,
  config: ModelConfig,
  length: int,
) -> dict[str, float]:
  """Summarises the metrics of consecutive steps as one record.

  Losses are averages over the target tokens of all applied steps, and the gradient norm is that of
  the last applied step. Skipped steps are counted. Learning rate and parameter norm are those of
  the last step.

  Args:
    steps: Metrics of the steps, on the host.
    seconds: Duration of the steps.
    config: The architecture.
    length: T, tokens per row.

  Returns:
    The record; see `docs/metrics.md` for its keys.
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
  if not math.isnan(rate := float(steps[-1].learning_rate)):  # NaN without a schedule
    record["learning_rate"] = rate
  if applied:
    record |= ratios(add([step.sums for step in applied]))
    record["gradient_norm"] = float(applied[-1].gradient_norm)
  utilisation = model_flop_utilisation(config, length, tokens_per_second)
  return record if utilisation is None else record | {"mfu": utilisation}


def eval_record(sums: Sums, seconds: float) -> dict[str, float]:
  """Returns loss, perplexity, accuracy, token counts and tokens/s of an evaluation."""
  values = ratios(sums)
  return {
    "loss": values["loss"],
    "perplexity": math.exp(min(values["loss"], 700.0)),
    "accuracy": values["accuracy"],
    "targets": float(sums.weight),
    "tokens": float(sums.tokens),
    "tokens_per_second": float(sums.tokens) / seconds if seconds > 0 else 0.0,
  }
