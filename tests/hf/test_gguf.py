"""Files are written by the `gguf` package. Oracles: its dequantiser and llama.cpp's permute."""

import json

import gguf as gguf_format
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers import GenerationConfig

from ll3m import families
from ll3m.hf import gguf
from ll3m.hf.lazy_tensor import read_part
from ll3m.hf.model_files import open_model

# Parts of a block of K-quants are read; rows of both q and k are permuted.
D, F, N, K, V = 512, 256, 4, 2, 45
SHAPES = {
  "token_embd.weight": (V, D),
  "output_norm.weight": (D,),
  "blk.0.attn_norm.weight": (D,),
  "blk.0.ffn_norm.weight": (D,),
  "blk.0.attn_q.weight": (D, D),
  "blk.0.attn_k.weight": (D * K // N, D),
  "blk.0.attn_v.weight": (D * K // N, D),
  "blk.0.attn_output.weight": (D, D),
  "blk.0.ffn_gate.weight": (F, D),
  "blk.0.ffn_up.weight": (F, D),
  "blk.0.ffn_down.weight": (D, F),
}


def can_dequantize(kind: Kind) -> bool:
  _, nbytes = gguf_format.GGML_QUANT_SIZES[kind]
  try:
    dequantize(np.zeros(nbytes, np.uint8), kind)
  except NotImplementedError:
    return False
  return True


QUANTISED = [
  kind for kind in Kind
  if kind not in (Kind.F32, Kind.F16, Kind.BF16, Kind.F64) and can_dequantize(kind)
]  # fmt: skip


def interleave(weights, heads):
  """Permutes q or k as llama.cpp's converter does (convert_hf_to_gguf.py, LlamaModel.permute)."""
  rows = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
  return rows.swapaxes(1, 2).reshape(weights.shape)


def write(path, tensors=None, skip=(), arch="llama", **metadata):
  """Writes a GGUF file.

  Args:
    path: The path of the file.
    tensors: Pairs (bytes or values, kind) by tensor name; zeros in float32 by default.
    skip: Keys and tensors to omit.
    arch: The architecture.
    **metadata: Values that replace the default metadata.
  """
  writer = gguf_format.GGUFWriter(path, arch)
  pairs = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
  } | {name.replace("__", "."): value for name, value in metadata.items()}
  for key, value in pairs.items():
    if key not in skip and value is not None:
      add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
      add.get(type(value), writer.add_array if isinstance(value, list) else writer.add_uint32)(
        key, value
      )
  if "epsilon" not in skip:
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  for name, shape in SHAPES.items():
    data, kind = (tensors or {}).get(name, (np.zeros(shape, np.float32), Kind.F32))
    if name not in skip:
      writer.add_tensor(name, data, raw_dtype=kind)
  for name in (tensors or {}).keys() - SHAPES.keys():
    writer.add_tensor(name, tensors[name][0], raw_dtype=tensors[name][1])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


def test_reads_the_config(path):
  file = gguf.open_gguf(write(path))
  family, config = families.from_hf_config(file.config)
  assert family.name == "llama"
  assert config == families.get_preset("llama2_7b").config.replace(
    vocab_size=V, d_model=D, d_ff=F, num_layers=1, num_heads=N, num_kv_heads=K, head_dim=D // N,
    max_positions=64, tie_embeddings=True,
  )  # fmt: skip
  assert {k: file.config[k] for k in ("bos_token_id", "eos_token_id")} == {
    "bos_token_id": 1,
    "eos_token_id": 2,
  }
  assert "pad_token_id" not in file.config
  assert not file.tokenizer_files


def test_a_separate_head_unties_the_embedding(path):
  tensors = {"output.weight": (np.ones((V, D), np.float32), Kind.F32)}
  file = gguf.open_gguf(write(path, tensors))
  assert not file.config["tie_word_embeddings"]
  assert file.tensors["lm_head.weight"].shape == (V, D)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_undoes_the_interleaving_of_q_and_k(path, dtype, same_bits, read_all):
  random = np.random.default_rng(0)
  kind = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "float64": Kind.F64}[
    np.dtype(dtype).name
  ]
  tensors, expected = {}, {}
  for name, heads in (("attn_q", N), ("attn_k", K), ("attn_v", 1)):
    values = random.standard_normal(SHAPES[f"blk.0.{name}.weight"]).astype(dtype)
    expected[name] = values
    stored = interleave(values, heads) if heads > 1 else values
    stored = stored.view(np.uint8) if kind == Kind.BF16 else stored
    tensors[f"blk.0.{name}.weight"] = (stored, kind)
  file = gguf.open_gguf(write(path, tensors))
  for name, values in expected.items():
    tensor = file.tensors[f"model.layers.0.self_attn.{name[-1]}_proj.weight"]
    same_bits(read_all(tensor), values)
    part = read_part(tensor, (slice(3, 401), slice(7, 90)), transpose=True)
    same_bits(part, np.ascontiguousarray(values.T[3:401, 7:90]))


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_reads_any_part_of_every_quantisation(path, kind, same_bits, read_all):
  """Random bytes are valid blocks; a part must equal that part of the dequantised whole."""
  block, nbytes = gguf_format.GGML_QUANT_SIZES[kind]
  random = np.random.default_rng(0)
  tensors, expected = {}, {}
  for name in ("attn_q", "ffn_up"):
    rows, columns = SHAPES[f"blk.0.{name}.weight"]
    data = random.integers(0, 256, (rows, columns // block * nbytes), np.uint8)
    data &= 0x3F  # no infinite scales
    tensors[f"blk.0.{name}.weight"] = (data, kind)
    expected[name] = dequantize(data, kind)
  half = D // N // 2
  order = [(h * half + i) * 2 + j for h in range(N) for j in range(2) for i in range(half)]
  expected["attn_q"] = expected["attn_q"][order]
  file = gguf.open_gguf(write(path, tensors))
  names = {"attn_q": "self_attn.q_proj", "ffn_up": "mlp.up_proj"}
  for name, hf in names.items():
    tensor = file.tensors[f"model.layers.0.{hf}.weight"]
    values = expected[name]
    assert np.isfinite(values).all() and values.std() > 0
    same_bits(read_all(tensor), values)
    part = (slice(5, 200), slice(33, 301))
    same_bits(read_part(tensor, part), np.ascontiguousarray(values[part]))


def test_common_quantisations_are_supported():
  names = {kind.name for kind in QUANTISED}
  assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= names


def test_dequantised_values_are_close_to_the_originals(path, read_all):
  values = np.random.default_rng(0).standard_normal((F, D)).astype(np.float32)
  tensors = {"blk.0.ffn_up.weight": (quantize(values, Kind.Q8_0), Kind.Q8_0)}
  tensor = gguf.open_gguf(write(path, tensors)).tensors["model.layers.0.mlp.up_proj.weight"]
  np.testing.assert_allclose(read_all(tensor), values, atol=0.02)


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    ({"arch": "qwen2moe"}, NotImplementedError,
     "architecture 'qwen2moe' .did you mean 'qwen2'.*; supported are llama, gemma, .*, olmo2"),
    ({"llama__expert_count": 8}, NotImplementedError, "mixture of experts"),
    ({"llama__attention__head_count": 0}, ValueError, "head_count=0, expected a positive number"),
    ({"split__count": 2}, NotImplementedError, "part of a split model"),
    ({"skip": ("llama.block_count",)}, ValueError, "lacks .* llama.block_count"),
    ({"skip": ("token_embd.weight",)}, ValueError, "lacks the tensor token_embd.weight"),
    ({"tokenizer__ggml__model": "bert"}, NotImplementedError, "tokenizer of kind 'bert'"),
    ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "qwen35"},
     NotImplementedError, "pre='qwen35' .did you mean 'qwen2'.., expected one of gpt-2"),
    ({"tokenizer__ggml__model": "llama"}, ValueError, "lacks parts of its tokenizer"),
  ],
)  # fmt: skip
def test_rejects_files_that_are_not_supported(path, arguments, error, message):
  with pytest.raises(error, match=message):
    gguf.open_gguf(write(path, **arguments))


@pytest.mark.parametrize(
  ("metadata", "factor"),
  [
    ({}, 1.0),
    ({"llama.rope.scaling.type": "none"}, 1.0),
    ({"llama.rope.scaling.type": "linear"}, 1.0),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
    ({"llama.rope.scaling.factor": 2.5}, 2.5),  # llama.cpp: linear, if no type is given
    ({"llama.rope.scale_linear": 4.0}, 4.0),
    ({"llama.rope.scale_linear": 0.0}, 1.0),
    ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 4.0}, 4.0),
  ],
)
def test_reads_every_spelling_of_linear_scaling(path, metadata, factor):
  file = gguf.open_gguf(write(path, **metadata))
  assert families.from_hf_config(file.config).config.rope_scaling_factor == factor
  assert ("rope_scaling" in file.config) == (factor != 1)


@pytest.mark.parametrize(
  ("metadata", "error", "message"),
  [
    ({"llama.rope.scaling.type": "yarn"}, NotImplementedError, "scaling.type='yarn'; only"),
    ({"llama.rope.scaling.type": "longrope"}, NotImplementedError, "type='longrope'; only"),
    (
      {"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 4.0},
      ValueError, "factor=2.0, llama.rope.scale_linear=4.0 and .* contradict each other",
    ),
    (
      {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0},
      ValueError, "factor=2.0 and llama.rope.scaling.type='none', which contradict",
    ),
  ],
)  # fmt: skip
def test_rejects_other_and_contradictory_scaling(path, metadata, error, message):
  with pytest.raises(error, match=message):
    gguf.open_gguf(write(path, **metadata))


def test_rejects_frequency_factors_that_are_neither_one_nor_those_of_llama_3(path):
  name, ones = "rope_freqs.weight", np.ones(64, np.float32)
  file = gguf.open_gguf(write(path, {name: (ones, Kind.F32)}))
  assert name not in file.tensors
  assert "rope_scaling" not in file.config
  for factors in (np.linspace(1, 8, 64, dtype=np.float32), 2 * ones):
    with pytest.raises(NotImplementedError, match=f"has {name}, .* not as Llama 3.1 and 3.2 do"):
      gguf.open_gguf(write(path, {name: (factors, Kind.F32)}))


def test_rejects_half_of_longrope(path):
  factors = {"rope_factors_long.weight": (np.ones(64, np.float32), Kind.F32)}
  with pytest.raises(ValueError, match="has rope_factors_long.weight but lacks rope_factors_short"):
    gguf.open_gguf(write(path, factors))


NEUTRAL = {
  "general.name": "x", "general.sampling.temp": 0.5, "quantize.imatrix.file": "x",
  "someone.quantized_by": "x", "split.no": 0, "llama.vocab_size": V,
  "llama.rope.dimension_count": D // N, "llama.attention.key_length": D // N,
  "llama.attention.value_length": D // N, "llama.attention.causal": True,
  "llama.attention.sliding_window": 0, "llama.attention.scale": (D // N) ** -0.5,
  "llama.attention.clamp_kqv": 0.0, "llama.attn_logit_softcapping": 0.0,
  "llama.final_logit_softcapping": 0.0, "llama.logit_scale": 1.0, "llama.embedding_scale": 1.0,
  "llama.residual_scale": 0.0, "llama.expert_count": 0, "llama.expert_used_count": 0,
  "llama.use_parallel_residual": False, "llama.rope.scaling.finetuned": True,
  "llama.rope.scaling.original_context_length": 64, "llama.rope.scaling.attn_factor": 1.0,
  "llama.pooling_type": 0, "llama.feed_forward_length": [F], "llama.attention.head_count": [N],
  "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_sep_token": False,
  "tokenizer.ggml.remove_extra_whitespaces": False, "tokenizer.ggml.fim_pre_token_id": 3,
  "tokenizer.ggml.prefix_token_id": 3, "tokenizer.ggml.mask_token_id": 3,
}  # fmt: skip


def test_accepts_metadata_that_change_nothing(path):
  plain = gguf.open_gguf(write(path)).config
  assert gguf.open_gguf(write(path, **NEUTRAL)).config == plain


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("llama.vocab_size", V + 1), ("llama.rope.dimension_count", D // N // 2),
    ("llama.attention.value_length", 3), ("llama.attention.causal", False),
    ("llama.attention.sliding_window", 4096), ("llama.attention.scale", 0.5),
    ("llama.attention.clamp_kqv", 8.0), ("llama.attention.max_alibi_bias", 8.0),
    ("llama.attn_logit_softcapping", 50.0), ("llama.final_logit_softcapping", 30.0),
    ("llama.logit_scale", 0.5), ("llama.embedding_scale", 12.0), ("llama.residual_scale", 0.5),
    ("llama.use_parallel_residual", True), ("llama.rope.scaling.attn_factor", 1.5),
    ("tokenizer.ggml.add_space_prefix", True), ("tokenizer.ggml.add_sep_token", True),
    ("tokenizer.ggml.remove_extra_whitespaces", True),
    ("tokenizer.ggml.precompiled_charsmap", [1, 2]), ("tokenizer.ggml.suppress_tokens", [3]),
  ],
)  # fmt: skip
def test_rejects_metadata_that_change_something(path, key, value):
  with pytest.raises(NotImplementedError, match=f"model.gguf has {key}=.*, which is not supported"):
    gguf.open_gguf(write(path, **{key: value}))


def test_rejects_unknown_metadata(path):
  strange = {"llama.mystery": 2, "llama.attention.layer_norm_epsilon": 1e-3,
             "tokenizer.ggml.mystery": True, "tokenizer.chat_template.mystery": "x"}  # fmt: skip
  with pytest.raises(NotImplementedError) as error:
    gguf.open_gguf(write(path, **strange))
  for part in (*strange, "llama.mystery=2", "unknown to LL3M", "--remove-metadata"):
    assert part in str(error.value)


def test_rejects_layers_of_different_sizes(path):
  with pytest.raises(NotImplementedError, match=r"head_count_kv=\[2, 1\]; layers of different"):
    gguf.open_gguf(write(path, llama__attention__head_count_kv=[2, 1]))


def test_rejects_an_adapter(path):
  with pytest.raises(NotImplementedError, match="holds a lora adapter, not a model: merge it"):
    gguf.open_gguf(write(path, general__type="adapter", adapter__type="lora"))


@pytest.mark.parametrize(
  ("metadata", "eos"),
  [
    ({}, 2),
    ({"tokenizer.ggml.eot_token_id": 9}, [2, 9]),
    ({"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 8}, [2, 8]),
    ({"tokenizer.ggml.eos_token_ids": [2, 5]}, [2, 5]),
  ],
)
def test_all_tokens_that_end_an_answer_are_eos_in_generation_config(path, tmp_path, metadata, eos):
  folder = epath.Path(tmp_path / "converted")
  open_model(write(path, **metadata)).save_companions(folder)
  generation = GenerationConfig.from_pretrained(folder / "hf")
  assert (generation.bos_token_id, generation.eos_token_id) == (1, eos)
  assert json.loads((folder / "hf" / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("length", [0, 3, 100, 700, 100_000, -1])
def test_reports_a_truncated_file(path, length):
  write(path)
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(ValueError, match=r"model.gguf is (truncated|empty)"):
    gguf.open_gguf(path)


def test_reports_a_file_of_another_kind(path):
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
  with pytest.raises(ValueError, match="model.gguf is a Git LFS pointer"):
    gguf.open_gguf(path)
