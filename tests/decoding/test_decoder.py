"""Compares prefill and decoding steps with the full forward pass, for every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m.decoding.decode_params import unstack
from ll3m.decoding.decoder import make_decoder
from ll3m.families import FAMILIES, get_preset
from ll3m.models.transformer import make_model

TINY = {
  "vocab_size": 61, "d_model": 24, "d_ff": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
  "head_dim": 10, "max_positions": 64,
}  # fmt: skip
CONFIGS = {
  "llama": get_preset("llama2_7b").config.replace(**TINY),
  "llama_mha": get_preset("open_llama_3b").config.replace(**TINY | {"num_kv_heads": 4}),
  "smollm2": get_preset("smollm2_135m").config.replace(**TINY),
  "mistral": get_preset("mistral_7b").config.replace(**TINY, sliding_window=5),
  "mistral_window_1": get_preset("mistral_7b").config.replace(**TINY, sliding_window=1),
  "gemma": get_preset("gemma_2b").config.replace(**TINY | {"num_kv_heads": 1}),
  "phi": get_preset("phi_2").config.replace(**TINY, rope_scaling_factor=2.5),
  "llama3": get_preset("llama3.1_8b").config.replace(**TINY, rope_original_positions=16),
  "qwen2": get_preset("qwen2.5_7b").config.replace(
    **TINY | {"num_layers": 3}, sliding_window=5, layer_types=("full", "full", "sliding")
  ),
  "qwen3": get_preset("qwen3_8b").config.replace(**TINY),
  "gemma2": get_preset("gemma2_9b").config.replace(
    **TINY | {"num_layers": 3},
    sliding_window=5,
    query_pre_attn_scalar=7.0,
    attention_soft_cap=2.0,
    final_soft_cap=3.0,
  ),
  "gemma3": get_preset("gemma3_4b").config.replace(**TINY | {"num_layers": 8}, sliding_window=5),
  "phi3": get_preset("phi3_mini").config.replace(
    **TINY,
    sliding_window=6,
    rope_scaling="longrope",
    rope_scaling_factor=4.0,
    rope_original_positions=16,
    rope_short_factors=(1.0, 1.0, 1.1, 1.2, 1.5),
    rope_long_factors=(1.0, 1.3, 2.0, 5.0, 40.0),
  ),
  "smollm3": get_preset("smollm3_3b").config.replace(**TINY | {"num_layers": 5}),
  "olmo2": get_preset("olmo2_7b").config.replace(**TINY),
}
# Both compute in float32, with different orders of summation.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def random_params(config, seed=0):
  """Returns random weights, including norms and biases, so that a missing one is detected."""
  shapes = jax.eval_shape(make_model(config).init, jax.random.key(0))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    center = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(rng.normal(center, 0.3, leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, tokens):
  model = make_model(config)
  return model.logits(params, model.hidden(params, tokens))


def full_logits(config, params, tokens):
  """Returns the logits [T, V] of one row; causal attention ignores the padding on its right."""
  padded = np.zeros((1, 32), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(_forward(config, params, jnp.asarray(padded)))[0, : len(tokens)]


def test_every_family_has_a_config():
  assert {name.split("_")[0] for name in CONFIGS} - {"smollm2", "llama3"} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_steps_equal_the_full_forward_pass(name):
  """Rows have different lengths; the ring has the length of the window and wraps around."""
  config = CONFIGS[name]
  params = random_params(config)
  rng = np.random.default_rng(0)
  total, width = 21, 8
  lengths = [8, 3, 1]
  rows = [rng.integers(0, config.vocab_size, length + total - width) for length in lengths]
  starts = np.array([width - length for length in lengths], np.int32)
  padded = np.zeros((3, width), np.int32)
  for target, row, start in zip(padded, rows, starts, strict=True):
    target[start:] = row[: width - start]

  decoder = make_decoder(config)
  weights = unstack(config, params, jnp.float32)
  is_long = config.rope_scaling == "longrope"  # `full_logits` has padding up to position 31
  hidden, cache = decoder.prefill(weights, padded, starts, total, is_long)
  found = [decoder.logits(weights.ends, hidden)]
  for column in range(width, total):
    tokens = np.array([row[column - start] for row, start in zip(rows, starts, strict=True)])
    hidden, cache = decoder.step(weights, cache, tokens, np.int32(column), starts, is_long)
    found.append(decoder.logits(weights.ends, hidden))
  windows = [kind.window for kind in config.layer_kinds]
  for (keys, _), window in zip(cache, windows, strict=True):
    length = min(total, window or total)
    assert keys.shape == (3, config.num_kv_heads, length, config.head_dim)
  if name == "gemma3":  # five layers of six have a window, and of the two layers left both
    assert windows == [5, 5, 5, 5, 5, None, 5, 5]

  found = np.stack(found, axis=1)  # [B, steps, V]
  for row, length, logits in zip(rows, lengths, found, strict=True):
    expected = full_logits(config, params, row)[length - 1 :]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, **TOLERANCE)


def test_a_ring_shorter_than_the_prompt_keeps_the_last_columns():
  config = CONFIGS["mistral"]
  params = random_params(config)
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, 24).astype(np.int32)
  decoder = make_decoder(config)
  weights = unstack(config, params, jnp.float32)
  starts = np.zeros(1, np.int32)
  hidden, cache = decoder.prefill(weights, tokens[None, :17], starts, 5)
  for column in range(17, 24):
    hidden, cache = decoder.step(weights, cache, tokens[None, column], np.int32(column), starts)
  expected = full_logits(config, params, tokens)[-1]
  found = np.asarray(decoder.logits(weights.ends, hidden))[0]
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, **TOLERANCE)


def test_memory_of_a_long_prompt_is_the_sum_over_both_kinds_of_layers():
  """Gemma 3 4B: 29 layers with a window of 1,024 keys, and 5 that keep all 32,768."""
  config = get_preset("gemma3_4b").config

  def prefill(tokens, starts):
    params = make_model(config).init(jax.random.key(0))
    weights = unstack(config, params, jnp.bfloat16)
    return make_decoder(config, dtype=jnp.bfloat16).prefill(weights, tokens, starts, 32_768)[1]

  shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 32_768), (1,))]
  cache = jax.eval_shape(prefill, *shapes)
  found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  bytes_per_column = 2 * 4 * 256 * 2  # keys and values of 4 heads, in bfloat16
  assert found == bytes_per_column * (29 * 1024 + 5 * 32_768)
  assert found < 0.18 * bytes_per_column * 34 * 32_768
