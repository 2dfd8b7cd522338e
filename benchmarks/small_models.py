"""Whole models that are small enough for a laptop, and their validation before they are timed.

Dimensions: B rows, T tokens, V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.validation import largest_error, mode_of
from ll3m import families
from ll3m.core.model_config import ModelConfig
from ll3m.data.batch import Batch
from ll3m.decoding.decode_params import unstack
from ll3m.decoding.decoder import make_decoder
from ll3m.models.kernels import Kernels
from ll3m.models.transformer import Model, Params, make_model
from ll3m.training.loss import token_sums
from tests.kernels.tolerances import FLOAT32

MODELS = {
  "llama2_7b": {"num_heads": 4, "num_kv_heads": 4},
  "mistral_7b": {"num_heads": 4, "num_kv_heads": 2, "sliding_window": 64},
  "gemma_2b": {"num_heads": 4, "num_kv_heads": 1},
  "phi_2": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 80},
}
SMALL = {"vocab_size": 4096, "d_model": 256, "d_ff": 688, "num_layers": 4, "head_dim": 64}
# Sizes of the validation; the length exceeds the window and is not a multiple of a tile.
CHECKED = {"num_layers": 2, "vocab_size": 512}
IMPLEMENTATIONS = ("pallas", "xla")
CHECKED_ROWS, CHECKED_LENGTH, CHECKED_STEPS = 1, 72, 2


def config_of(model: str, **changes: int) -> ModelConfig:
  """Returns the config of a preset's family at a small size."""
  return families.get_preset(model).config.replace(**(SMALL | MODELS[model] | changes))


def random_batch(config: ModelConfig, rows: int, length: int) -> Batch:
  """Returns random rows of one document each, [B, T]."""
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1), np.int32)
  ones = np.ones((rows, length), np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
  arrays = tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions
  return Batch(*(np.ascontiguousarray(array) for array in arrays))


@functools.cache
def validate_training(model: str) -> float:
  """Compares loss and gradients through the kernels with jax.nn on all logits of plain jnp.

  Everything is float32. The tolerance is that of one kernel.

  Args:
    model: Key of `MODELS`.

  Returns:
    The largest error, relative to the largest value in its array.

  Raises:
    AssertionError: The error exceeds the tolerance.
  """
  config = config_of(model, **CHECKED)
  batch = jax.tree.map(jnp.asarray, random_batch(config, CHECKED_ROWS, CHECKED_LENGTH))
  plain = make_model(config, kernels=Kernels("xla"))
  params = _params(model)
  expected = _in_mode("xla", jax.value_and_grad(lambda p: direct_loss(plain, p, batch)), params)
  worst = 0.0
  for implementation in IMPLEMENTATIONS:
    candidate = make_model(config, kernels=Kernels(implementation))

    def loss(params, candidate=candidate):
      sums = token_sums(candidate, params, batch)
      return sums.loss / sums.weight

    actual = _in_mode(implementation, jax.value_and_grad(loss), params)
    errors = jax.tree.map(largest_error, actual, expected)
    worst = _worst(f"{model}, {implementation}: loss and gradients", worst, errors)
  return worst


@functools.cache
def validate_decoding(model: str) -> float:
  """Compares the logits of cached steps through the kernels with whole rows without a cache.

  Args:
    model: Key of `MODELS`.

  Returns:
    The largest error, relative to the largest logit.

  Raises:
    AssertionError: The error exceeds the tolerance.
  """
  config = config_of(model, **CHECKED)
  plain = make_model(config, kernels=Kernels("xla"))
  params = _params(model)
  batch = jax.tree.map(jnp.asarray, random_batch(config, CHECKED_ROWS, CHECKED_LENGTH))
  prompt = CHECKED_LENGTH - CHECKED_STEPS
  whole = _in_mode("xla", lambda p: plain.logits(p, plain.hidden(p, batch.inputs)), params)
  worst = 0.0
  for implementation in IMPLEMENTATIONS:
    decoder = make_decoder(config, kernels=Kernels(implementation))
    weights = unstack(config, params, jnp.float32)
    starts = np.zeros(CHECKED_ROWS, np.int32)
    with mode_of(implementation), jax.default_matmul_precision("highest"):
      slots = CHECKED_LENGTH
      hidden, cache = decoder.prefill(weights, batch.inputs[:, :prompt], starts, slots)
      for column in range(prompt, CHECKED_LENGTH + 1):
        logits = decoder.logits(weights.ends, hidden)
        error = largest_error(logits, whole[:, column - 1])
        worst = _worst(f"{model}, {implementation}: logits at {column}", worst, error)
        if column < CHECKED_LENGTH:
          newest = batch.inputs[:, column]
          hidden, cache = decoder.step(weights, cache, newest, np.int32(column), starts)
  return worst


def direct_loss(model: Model, params: Params, batch: Batch) -> Float[Array, ""]:
  """Returns the mean loss per token with every logit in memory."""
  logits = model.logits(params, model.hidden(params, batch.inputs, batch.positions))
  log_probabilities = jax.nn.log_softmax(logits)  # [B, T, V]
  picked = jnp.take_along_axis(log_probabilities, batch.targets[..., None], -1)
  return -jnp.mean(picked)


def _worst(name: str, worst: float, errors) -> float:
  error = np.max(jax.tree.leaves(errors))  # NaN if any is
  assert error <= FLOAT32, f"{name}: largest error {error:.3g}, allowed {FLOAT32}: {errors}"
  return max(worst, float(error))


@functools.cache
def _params(model: str) -> Params:
  """Returns random parameters, including biases and norms, which training starts at 0 and 1."""
  init = make_model(config_of(model, **CHECKED), kernels=Kernels("xla")).init
  rng = np.random.default_rng(0)
  return jax.tree.map_with_path(
    lambda path, x: jnp.asarray(
      rng.normal(float(path[-1].key == "scale"), 0.05, x.shape), jnp.float32
    ),
    jax.eval_shape(init, jax.random.key(0)),
  )


def _in_mode(implementation: str, function: Callable, *args):
  with mode_of(implementation), jax.default_matmul_precision("highest"):
    return jax.jit(function)(*args)
