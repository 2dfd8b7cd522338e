"""Throughput of whole training and decoding steps of a small model, in tokens per second."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m import families
from ll3m.core import sharding
from ll3m.data.batch import Batch
from ll3m.decoding.engine import Engine
from ll3m.training.inputs import to_devices
from ll3m.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from ll3m.training.setup import build_model
from ll3m.training.step import init_state, make_train_step

ROWS, LENGTH, NEW_TOKENS = 2, 128, 32
SMALL = {"vocab_size": 4096, "d_model": 256, "d_ff": 688, "num_layers": 4, "head_dim": 64}
PRESETS = {
  "llama2_7b": {"num_heads": 4, "num_kv_heads": 4},
  "mistral_7b": {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 64},
  "gemma_2b": {"num_heads": 4, "num_kv_heads": 1},
  "phi_2": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 80},
}


@pytest.fixture(params=PRESETS)
def config(request):
  """A family's switches at a size that a laptop can run."""
  return families.get_preset(request.param).config.replace(**(SMALL | PRESETS[request.param]))


def test_training_step(benchmark, config):
  """AdamW on 2 x 128 tokens, float32, compiled and synchronised."""
  mesh = sharding.make_mesh("-1,1,1")
  options = OptimizerConfig()
  optimizer = make_optimizer(options, 1000)
  model = build_model(config, mesh, dtype="f32")
  step = jax.jit(
    make_train_step(model, optimizer, make_schedule(options.chosen, 1000)), donate_argnums=0
  )
  state = init_state(model.init(jax.random.key(0)), optimizer, jnp.zeros(2, jnp.uint32))
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, ROWS, LENGTH + 1), np.int32)
  ones = np.ones((1, ROWS, LENGTH), np.int32)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape).copy()
  batch = to_devices(
    Batch(
      tokens[..., :-1].copy(), tokens[..., 1:].copy(), ones.astype(np.float32), ones, positions
    ),
    mesh,
  )

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    return jax.block_until_ready(metrics)

  metrics = run()  # compiles
  assert np.isfinite(float(metrics.sums.loss))
  benchmark.pedantic(run, rounds=10, warmup_rounds=2)
  benchmark.extra_info["tokens_per_second"] = ROWS * LENGTH / benchmark.stats.stats.median


def test_greedy_decoding(benchmark, config):
  """32 new tokens for one prompt, float32, prefill included."""
  model = build_model(config, sharding.make_mesh("-1,1,1"), dtype="f32")
  engine = Engine(config, model.init(jax.random.key(0)))
  prompt = list(range(1, 17))

  def run():
    return engine.generate([prompt], max_new_tokens=NEW_TOKENS)

  (row,) = run()  # compiles
  assert len(row) == NEW_TOKENS
  benchmark.pedantic(run, rounds=5, warmup_rounds=1)
  benchmark.extra_info["tokens_per_second"] = NEW_TOKENS / benchmark.stats.stats.median
