"""Files are written with the `gguf` package; oracles: its dequantiser, llama.cpp's permute."""

import gguf as gguf_format
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from ll3m import families
from ll3m.hf import gguf
from ll3m.hf.tensors import read_part

# A quarter of a block of K-quants is no multiple of anything; rows of both q and k are permuted.
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
  """What llama.cpp's converter does to q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
  rows = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
  return rows.swapaxes(1, 2).reshape(weights.shape)


def write(path, tensors=None, skip=(), arch="llama", **metadata):
  """Writes a GGUF; tensors are (bytes or values, kind) by name, metadata replace the usual."""
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
      (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
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


def test_a_head_of_its_own_unties_the_embedding(path):
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
  """Random bytes are valid blocks; a part must be what the whole, dequantised at once, has."""
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


def test_lists_the_common_quantisations():
  names = {kind.name for kind in QUANTISED}
  assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= names


def test_quantised_values_are_near_the_original(path, read_all):
  values = np.random.default_rng(0).standard_normal((F, D)).astype(np.float32)
  tensors = {"blk.0.ffn_up.weight": (quantize(values, Kind.Q8_0), Kind.Q8_0)}
  tensor = gguf.open_gguf(write(path, tensors)).tensors["model.layers.0.mlp.up_proj.weight"]
  np.testing.assert_allclose(read_all(tensor), values, atol=0.02)


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    ({"arch": "qwen2"}, NotImplementedError, "architecture 'qwen2', expected 'llama'"),
    ({"llama__expert_count": 8}, NotImplementedError, "mixture of experts"),
    ({"split__count": 2}, NotImplementedError, "one part of several"),
    ({"skip": ("llama.block_count",)}, ValueError, "lacks the metadata llama.block_count"),
    ({"skip": ("token_embd.weight",)}, ValueError, "lacks the tensor token_embd.weight"),
    ({"tokenizer__ggml__model": "bert"}, NotImplementedError, "tokenizer of kind 'bert'"),
    ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "tekken"},
     NotImplementedError, "cuts words as 'tekken', expected one of gpt-2"),
    ({"tokenizer__ggml__model": "llama"}, ValueError, "lacks parts of its tokenizer"),
  ],
)  # fmt: skip
def test_refuses_what_it_does_not_know(path, arguments, error, message):
  with pytest.raises(error, match=message):
    gguf.open_gguf(write(path, **arguments))


def test_scaled_rotary_embeddings_reach_the_config(path):
  tensors = {"rope_freqs.weight": (np.ones(64, np.float32), Kind.F32)}
  file = gguf.open_gguf(write(path, tensors))
  with pytest.raises(NotImplementedError, match="rotary scaling of type 'llama3'"):
    families.from_hf_config(file.config)
  file = gguf.open_gguf(write(path, llama__rope__scaling__type="yarn"))
  with pytest.raises(NotImplementedError, match="rotary scaling of type 'yarn'"):
    families.from_hf_config(file.config)


@pytest.mark.parametrize("length", [0, 3, 100, 700, 100_000, -1])
def test_names_a_truncated_file(path, length):
  write(path)
  path.write_bytes(path.read_bytes()[:length])
  with pytest.raises(ValueError, match=r"model.gguf is (truncated|empty)"):
    gguf.open_gguf(path)


def test_names_a_file_of_another_kind(path):
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
  with pytest.raises(ValueError, match="model.gguf is a Git LFS pointer"):
    gguf.open_gguf(path)
