"""GGUF files of every architecture, written from the parity fixtures as llama.cpp's converter does.

Oracles: the parameters, the config and the logits (of transformers) of the same fixture's folder.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import chex
import gguf as gguf_format
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from ll3m.hf import gguf
from ll3m.hf.gguf_architectures import ARCHITECTURES
from ll3m.hf.model_files import open_model
from ll3m.models import transformer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"

# The architecture in GGUF of each fixture that llama.cpp's converter accepts.
FIXTURE_OF = {
  "llama2": "llama", "llama2_linear": "llama", "llama3": "llama", "smollm2": "llama",
  "mistral_no_window": "llama", "gemma_2b": "gemma", "gemma2": "gemma2", "gemma3": "gemma3",
  "phi3": "phi3", "phi3_long": "phi3", "phi4_mini": "phi3", "phi4_mini_short": "phi3",
  "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3", "olmo2": "olmo2",
}  # fmt: skip
PERMUTED = ("llama", "smollm3")
SHIFTED = ("gemma", "gemma2", "gemma3")

# The converter's names of tensors, from the `gguf` package's list of Hugging Face's names.
TENSOR_NAMES = {
  name: gguf_format.get_tensor_name_map(arch, 9)
  for arch, name in gguf_format.MODEL_ARCH_NAMES.items()
  if name in ARCHITECTURES
}


def permute(weights, heads):
  """Permutes rows as the converter does (conversion/llama.py, LlamaModel.permute)."""
  rows = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
  return rows.swapaxes(1, 2).reshape(weights.shape)


def llama3_factors(hf):
  """Returns the factors of the converter (conversion/llama.py, generate_extra_tensors)."""
  scaling, size = hf["rope_scaling"], hf["head_dim"]
  original = scaling["original_max_position_embeddings"]
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  for frequency in hf["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float32) / size):
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
      yield 1.0
    elif wavelength > original / low:
      yield scaling["factor"]
    else:
      smooth = (original / wavelength - low) / (high - low)
      yield 1 / ((1 - smooth) / scaling["factor"] + smooth)


def write(path, fixture, arch, metadata=None, factors=None, **changes):
  """Writes a fixture's model as GGUF.

  Args:
    path: The path of the file.
    fixture: The name of the fixture.
    arch: The architecture in GGUF.
    metadata: Further metadata, which replace those of the converter.
    factors: The tensor rope_freqs.weight; None for that of the scaling in config.json, if any.
    **changes: Values of config.json to replace.
  """
  hf = json.loads((FIXTURES / fixture / "config.json").read_text()) | changes
  writer = gguf_format.GGUFWriter(path, arch)
  heads = hf["num_attention_heads"]
  kv_heads = hf.get("num_key_value_heads", heads)
  head_dim = hf.get("head_dim", hf["hidden_size"] // heads)
  writer.add_context_length(hf["max_position_embeddings"])
  writer.add_embedding_length(hf["hidden_size"])
  writer.add_block_count(hf["num_hidden_layers"])
  writer.add_feed_forward_length(hf["intermediate_size"])
  writer.add_head_count(heads)
  writer.add_head_count_kv(kv_heads)
  writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
  writer.add_bos_token_id(hf["bos_token_id"])
  if "rope_theta" in hf:  # not for Gemma 1 and 2
    writer.add_rope_freq_base(hf["rope_theta"])
  if "head_dim" in hf:
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
  if arch in PERMUTED:
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
  if arch in ("gemma2", "gemma3", "phi3"):
    writer.add_sliding_window(hf["sliding_window"] or 0)
  if arch == "gemma2":
    writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
  scaling = hf.get("rope_scaling") or {}
  kind = scaling.get("rope_type", scaling.get("type"))
  if kind == "linear":
    writer.add_rope_scaling_type(gguf_format.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(scaling["factor"])
  elif kind == "llama3":
    factors = list(llama3_factors(hf))
  if factors:
    writer.add_tensor("rope_freqs.weight", np.float32(factors))
  if arch == "phi3":
    original = hf["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(
      int(hf.get("partial_rotary_factor", 1) * hf["hidden_size"]) // heads
    )
    if kind == "longrope":
      scale = hf["max_position_embeddings"] / original
      writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
      for name in ("long", "short"):
        factors = np.float32(scaling[f"{name}_factor"])
        writer.add_tensor(f"rope_factors_{name}.weight", factors)
  for file in sorted((FIXTURES / fixture).glob("*.safetensors")):
    for name, values in load_file(file).items():
      if name.endswith(".rotary_emb.inv_freq"):
        continue
      if arch in SHIFTED and name.endswith("norm.weight"):
        values = values.astype(np.float32) + np.float32(1)
      if arch in PERMUTED and (match := re.search(r"\.([qk])_proj\.", name)):
        values = permute(values, heads if match[1] == "q" else kv_heads)
      renamed = TENSOR_NAMES[arch].get_name(name, try_suffixes=(".weight", ".bias"))
      is_bfloat16 = values.dtype.name == "bfloat16"  # which the writer does not know
      values = np.ascontiguousarray(values)
      writer.add_tensor(
        renamed, values.view(np.uint8) if is_bfloat16 else values,
        raw_dtype=Kind.BF16 if is_bfloat16 else None,
      )  # fmt: skip
  for key, value in (metadata or {}).items():
    writer.kv_data[-1].pop(key, None)
    kinds = {str: writer.add_string, float: writer.add_float32, list: writer.add_array}
    kinds.get(type(value), writer.add_uint32)(key, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def shifted(name, leaf, arch):
  """Returns a parameter after adding one and subtracting it again, as the converters do."""
  if arch in SHIFTED and "norm" in name:
    return (leaf.astype(jnp.float32) + jnp.float32(1)) - jnp.float32(1)
  return leaf


@pytest.mark.parametrize("fixture", FIXTURE_OF)
def test_a_file_equals_the_folder_that_it_was_made_from(tmp_path, fixture):
  arch = FIXTURE_OF[fixture]
  write(tmp_path / "model.gguf", fixture, arch)
  model, expected = open_model(tmp_path / "model.gguf"), open_model(FIXTURES / fixture)
  config = expected.config
  if config.query_pre_attn_scalar is not None:  # not in the file: llama.cpp knows it by the size
    assert model.config.query_pre_attn_scalar == config.head_dim
    model = dataclasses.replace(
      model, config=model.config.replace(query_pre_attn_scalar=config.query_pre_attn_scalar)
    )
  assert model.family == arch
  assert model.config == config
  params = model.load_params()
  chex.assert_trees_all_equal(
    params,
    {
      module: {leaf: shifted(module, value, arch) for leaf, value in leaves.items()}
      for module, leaves in expected.load_params().items()
    },
  )
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  oracle = np.load(FIXTURES / fixture / "expected.npz")
  decoder = transformer.make_model(config)
  logits = decoder.logits(params, jax.jit(decoder.hidden)(params, oracle["tokens"]))
  error = np.abs(np.asarray(logits) - oracle["logits"]).max() / np.abs(oracle["logits"]).max()
  assert error < 6e-6  # as in tests/models/test_parity.py


def test_every_architecture_has_a_fixture():
  assert set(FIXTURE_OF.values()) == set(ARCHITECTURES) == set(TENSOR_NAMES)


@pytest.mark.parametrize(
  ("fixture", "layers", "scalar"),
  [("gemma2", 46, 6), ("gemma2", 42, 16), ("gemma3", 62, 6), ("gemma3", 34, 16)],
)
def test_the_scale_of_the_scores_of_gemma_depends_on_the_size(tmp_path, fixture, layers, scalar):
  write(tmp_path / "model.gguf", fixture, fixture, num_hidden_layers=layers)
  config = gguf.open_gguf(tmp_path / "model.gguf").config
  assert config["query_pre_attn_scalar"] == scalar  # of d_model 24 and 4 heads of size 16


@pytest.mark.parametrize(
  ("pattern", "full"),
  [(None, [5]), (3, [2, 5]), (1, range(8)), (0, []), ([True] * 4 + [False] * 4, range(4, 8))],
)
def test_reads_which_layers_have_a_window(tmp_path, pattern, full):
  metadata = {} if pattern is None else {"gemma3.attention.sliding_window_pattern": pattern}
  write(tmp_path / "model.gguf", "gemma3", "gemma3", metadata=metadata)
  types = open_model(tmp_path / "model.gguf").config.all_layer_types
  assert [i for i, name in enumerate(types) if name == "full"] == list(full)


def test_rejects_a_window_for_another_number_of_layers(tmp_path):
  metadata = {"gemma3.attention.sliding_window_pattern": [True, False]}
  write(tmp_path / "model.gguf", "gemma3", "gemma3", metadata=metadata)
  with pytest.raises(ValueError, match="sliding_window_pattern for 2 layers, expected 8"):
    gguf.open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("fixture", ["gemma3", "phi3"])
def test_a_window_of_zero_means_none(tmp_path, fixture):
  write(tmp_path / "model.gguf", fixture, fixture, sliding_window=0)
  assert open_model(tmp_path / "model.gguf").config.sliding_window is None


LLAMA31 = {
  "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_recovers_the_scaling_of_llama_3(tmp_path, factor, head_dim):
  scaling = LLAMA31 | {"factor": factor}
  write(tmp_path / "model.gguf", "llama3", "llama", rope_scaling=scaling, head_dim=head_dim)
  found = gguf.open_gguf(tmp_path / "model.gguf").config["rope_scaling"]
  assert found == scaling | {"type": "llama3"}


@pytest.mark.parametrize("change", [{"high_freq_factor": 8.0}, {"low_freq_factor": 2.0}])
def test_rejects_factors_of_other_formulas(tmp_path, change):
  path = tmp_path / "model.gguf"
  write(path, "llama3", "llama", rope_scaling=LLAMA31 | change, head_dim=128)
  with pytest.raises(NotImplementedError, match=r"has rope_freqs.weight, .* Llama 3.1 and 3.2 do"):
    gguf.open_gguf(path)


def test_reads_another_magnitude_of_longrope(tmp_path):
  metadata = {"phi3.rope.scaling.attn_factor": 1.25}
  write(tmp_path / "model.gguf", "phi3_long", "phi3", metadata=metadata)
  assert open_model(tmp_path / "model.gguf").config.rope_magnitude == 1.25


@pytest.mark.parametrize(
  ("arch", "metadata", "message"),
  [
    ("qwen2", {"qwen2.attention.sliding_window": 8}, "qwen2.attention.sliding_window=8, which is"),
    ("olmo2", {"olmo2.attention.sliding_window": 8}, "olmo2.attention.sliding_window=8, which is"),
    ("qwen3", {"qwen3.rope.scaling.type": "yarn"}, "qwen3.rope.scaling.type='yarn'; only"),
    ("qwen3", {"qwen3.rope.dimension_count": 6}, "qwen3.rope.dimension_count=6, which is not"),
    ("gemma3", {"gemma3.mystery": 1}, "gemma3.mystery=1, unknown to LL3M"),
  ],
)
def test_names_the_key_that_is_not_supported(tmp_path, arch, metadata, message):
  write(tmp_path / "model.gguf", arch, arch, metadata=metadata)
  with pytest.raises(NotImplementedError, match=message):
    gguf.open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("attention.key_length", "phi3.attention.key_length=0, expected a positive"),
    ("rope.dimension_count", "phi3.rope.dimension_count=0, expected a positive"),
    ("rope.scaling.original_context_length", "original_context_length=0, expected at least 2"),
  ],
)
def test_rejects_sizes_of_zero(tmp_path, key, message):
  write(tmp_path / "model.gguf", "phi3_long", "phi3", metadata={f"phi3.{key}": 0})
  with pytest.raises(ValueError, match=message):
    gguf.open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("factor", [0.0, -1.0, np.inf, np.nan])
def test_rejects_strange_factors(tmp_path, factor):
  write(tmp_path / "model.gguf", "llama2", "llama", factors=[1.0, 2.0, factor, 8.0])
  with pytest.raises(NotImplementedError, match="has rope_freqs.weight"):
    gguf.open_gguf(tmp_path / "model.gguf")
