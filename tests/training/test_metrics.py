"""FLOPs against a count of every matrix product, and records from sums."""

import math

import numpy as np
import pytest

from ll3m import families
from ll3m.training import metrics
from ll3m.training.loss import Sums
from ll3m.training.step import StepMetrics


def counted_flops(config, length):
  """Counts the multiply-adds of one row's forward pass; returns that times 2, times 3."""
  heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
  total = 0
  for _ in range(config.num_layers):
    total += length * config.d_model * size * (heads + 2 * kv_heads)
    total += length * heads * size * config.d_model
    total += length * config.d_model * config.d_ff * (3 if config.gated_mlp else 2)
    for query in range(length):
      window = config.sliding_window or length
      seen = min(query + 1, window)
      total += 2 * seen * heads * size
  total += length * config.d_model * config.vocab_size
  return 6 * total


@pytest.mark.parametrize("preset", ["llama2_7b", "mistral_7b", "gemma_2b", "phi_2"])
@pytest.mark.parametrize("length", [512, 6000])
def test_flops_per_token_match_a_count_of_all_products(preset, length):
  config = families.get_preset(preset).config.replace(num_layers=2)
  # Under a causal mask, the formula takes length / 2 keys on average, the count (length + 1) / 2.
  expected = counted_flops(config, length) / length
  assert metrics.flops_per_token(config, length) == pytest.approx(expected, rel=1e-3)


def test_records_are_weighted_by_tokens():
  few = Sums(*map(np.float32, (10.0, 1.0, 1.0, 2.0, 4.0)))
  many = Sums(*map(np.float32, (20.0, 2.0, 5.0, 8.0, 10.0)))
  steps = [
    StepMetrics(sums, *map(np.float32, (n, 2 * n, 3 * n, 0))) for sums, n in ((few, 1), (many, 2))
  ]
  config = families.get_preset("llama2_7b").config
  record = metrics.summarise(steps, seconds=4.0, config=config, length=16)
  assert record == {
    "loss": 3.0, "z_loss": 0.3, "accuracy": 0.6, "gradient_norm": 2.0, "parameter_norm": 4.0,
    "learning_rate": 6.0, "tokens_per_second": 3.5, "step_seconds": 2.0,
    "skipped_steps": 0.0,
  }  # fmt: skip


def test_sums_without_targets_give_no_nan():
  nothing = Sums(*map(np.float32, (0, 0, 0, 0, 0)))
  assert metrics.ratios(nothing) == {"loss": 0.0, "z_loss": 0.0, "accuracy": 0.0}
  record = metrics.eval_record(Sums(*map(np.float32, (8.0, 0, 1, 4, 5))), 2.0)
  assert record["perplexity"] == pytest.approx(math.e**2)
  assert record["tokens_per_second"] == 2.5
  assert (record["targets"], record["tokens"]) == (4.0, 5.0)
