"""Throughput of whole training and decoding steps of small models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import small_models
from benchmarks.measuring import Work, dtype, implementation, is_accelerated, time_and_record
from ll3m.core import sharding
from ll3m.decoding.engine import Engine
from ll3m.training.metrics import flops_per_token
from ll3m.training.model_choice import build_model
from ll3m.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from ll3m.training.sharded_batches import to_devices
from ll3m.training.step import init_state, make_train_step

ROWS, LENGTH = 2, 128
PROMPT, NEW_TOKENS = 16, 32


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("model_name", small_models.MODELS)
def test_training_step(benchmark, model_name):
  """Times AdamW on 2 x 128 tokens; bytes count parameters and moments, read and written once."""
  error = small_models.validate_training(model_name)
  config = small_models.config_of(model_name)
  mesh = _one_device()
  options = OptimizerConfig()
  optimizer = make_optimizer(options, 1000)
  model = build_model(config, mesh, dtype="bf16" if is_accelerated() else "f32")
  step = jax.jit(
    make_train_step(model, optimizer, make_schedule(options.chosen, 1000)), donate_argnums=0
  )
  state = init_state(model.init(jax.random.key(0)), optimizer, jnp.zeros(2, jnp.uint32))
  rows = small_models.random_batch(config, ROWS, LENGTH)
  batch = to_devices(jax.tree.map(lambda array: array[None], rows), mesh)
  tokens = ROWS * LENGTH
  work = Work(flops_per_token(config, LENGTH) * tokens, 2 * _nbytes(state), tokens)

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    return state, metrics

  time_and_record(benchmark, run, work, _facts(config, error, f"B={ROWS} T={LENGTH}"))
  assert np.isfinite(float(run()[1].sums.loss))


@pytest.mark.benchmark(group="greedy decoding")
@pytest.mark.parametrize("model_name", small_models.MODELS)
def test_greedy_decoding(benchmark, model_name):
  """Times a prefill of 16 tokens and 32 new ones; bytes count the parameters per new token."""
  error = small_models.validate_decoding(model_name)
  config = small_models.config_of(model_name)
  model = build_model(config, _one_device(), dtype="f32")
  params = model.init(jax.random.key(0))
  engine = Engine(config, params, dtype=dtype())
  prompt = list(range(1, PROMPT + 1))

  def run():
    return engine.generate([prompt], max_new_tokens=NEW_TOKENS)

  (row,) = run()
  assert len(row) == NEW_TOKENS
  # A forward pass has a third of the FLOPs of a training step.
  flops = flops_per_token(config, PROMPT + NEW_TOKENS) / 3 * (PROMPT + NEW_TOKENS)
  nbytes = sum(x.size for x in jax.tree.leaves(params)) * dtype().dtype.itemsize * NEW_TOKENS
  shape = f"prompt={PROMPT} new={NEW_TOKENS}"
  time_and_record(benchmark, run, Work(flops, nbytes, NEW_TOKENS), _facts(config, error, shape))


def _one_device():
  return sharding.make_mesh("1,1,1", jax.devices()[:1])


def _nbytes(tree) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def _facts(config, error: float, shape: str) -> dict:
  return {
    "implementation": implementation(),
    "dtype": jnp.dtype(dtype()).name,
    "shape": f"{shape} D={config.d_model} L={config.num_layers} V={config.vocab_size}",
    "reduced": "a small model of the family",
    "validated": (
      f"T={small_models.CHECKED_LENGTH} L={small_models.CHECKED['num_layers']} float32, "
      f"{'compiled' if implementation() == 'pallas' else 'interpreted'}"
    ),
    "largest_error": error,
    "rate": "tokens_per_second",
  }
