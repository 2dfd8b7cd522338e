"""GGUF files of the Llama architecture: weights of any quantisation, config and tokenizer.

A GGUF holds everything in one file: metadata as key-value pairs, and tensors that are mostly
quantised in blocks along their last axis. The q and k rows of Llama models are interleaved for
the rotary convention of llama.cpp, (h, i, half) where Hugging Face has (h, half, i).
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_format
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from ll3m.hf.gguf_tokenizer import tokenizer_files
from ll3m.hf.tensors import Index, LazyTensor, describe_wrong_file

_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_PLAIN = {
  GGMLQuantizationType.F64: np.dtype(np.float64),
  GGMLQuantizationType.F32: np.dtype(np.float32),
  GGMLQuantizationType.F16: np.dtype(np.float16),
  GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """What a GGUF holds, in Hugging Face's terms.

  Attributes:
    config: a config.json.
    tensors: by their Hugging Face names, dequantised (to float32) when they are read.
    tokenizer_files: makers of the tokenizer's files, by name.
  """

  config: dict[str, Any]
  tensors: dict[str, LazyTensor]
  tokenizer_files: dict[str, Callable[[], bytes]]


def open_gguf(path: Path) -> GgufFile:
  """Reads a file's metadata and describes its tensors.

  Raises:
    ValueError: not a GGUF file, truncated, or its metadata lack something.
    NotImplementedError: another architecture, or a quantisation that cannot be undone.
  """
  try:
    reader = GGUFReader(path)
  except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
    wrong = describe_wrong_file(path) or f"truncated or not a GGUF file ({error})"
    raise ValueError(f"{path} is {wrong}") from error
  metadata = _Metadata(path, reader)
  architecture = metadata.get("general.architecture")
  if architecture != "llama":
    raise NotImplementedError(f"{path} is of architecture {architecture!r}, expected 'llama'")
  if metadata.get("split.count", 1) > 1:
    raise NotImplementedError(f"{path} is one part of several; merge them with llama-gguf-split")
  if metadata.get("llama.expert_count", 0):
    raise NotImplementedError(f"{path} is a mixture of experts, which is not supported")
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _hf_config(metadata, tensors)
  heads = {
    "attn_q": config["num_attention_heads"],
    "attn_k": config["num_key_value_heads"],
  }
  lazy = {}
  for name, tensor in tensors.items():
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    hf_name, interleaved = _NAMES.get(name, name), None
    if layer and layer[2] in _LAYER_NAMES:
      hf_name = f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
      interleaved = heads.get(layer[2])
    lazy[hf_name] = _lazy_tensor(path, tensor, interleaved)
  return GgufFile(config, lazy, tokenizer_files(metadata.get, path))


class _Metadata:
  """The key-value pairs, as plain Python values."""

  def __init__(self, path: Path, reader: GGUFReader):
    self.path = path
    self._fields = reader.fields

  def get(self, key: str, default: Any = None) -> Any:
    field = self._fields.get(key)
    return default if field is None else field.contents()

  def require(self, key: str) -> Any:
    if key not in self._fields:
      raise ValueError(f"{self.path} lacks the metadata {key}")
    return self.get(key)


def _hf_config(metadata: _Metadata, tensors: dict[str, Any]) -> dict[str, Any]:
  """Writes a config.json from the metadata."""
  if "token_embd.weight" not in tensors:
    raise ValueError(f"{metadata.path} lacks the tensor token_embd.weight")
  num_heads = metadata.require("llama.attention.head_count")
  d_model = metadata.require("llama.embedding_length")
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    "hidden_size": d_model,
    "intermediate_size": metadata.require("llama.feed_forward_length"),
    "num_hidden_layers": metadata.require("llama.block_count"),
    "num_attention_heads": num_heads,
    "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
    "head_dim": metadata.get("llama.attention.key_length", d_model // num_heads),
    "max_position_embeddings": metadata.require("llama.context_length"),
    "rms_norm_eps": _decimal(metadata.require("llama.attention.layer_norm_rms_epsilon")),
    "rope_theta": _decimal(metadata.get("llama.rope.freq_base", 10_000.0)),
    "hidden_act": "silu",
    "tie_word_embeddings": "output.weight" not in tensors,
  }
  scaling = metadata.get("llama.rope.scaling.type", "none")
  if "rope_freqs.weight" in tensors:
    scaling = "llama3"
  if scaling != "none":
    config["rope_scaling"] = {"rope_type": scaling}
  for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
    token = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if token is not None:
      config[f"{name}_token_id"] = token
  return config


def _decimal(value: float) -> float:
  """Takes a float32 for the shortest decimal that rounds to it: 1e-05, not 9.999999747e-06."""
  return float(str(np.float32(value)))


def _lazy_tensor(path: Path, tensor: Any, interleaved: int | None) -> LazyTensor:
  kind = tensor.tensor_type
  shape = tuple(int(n) for n in tensor.shape[::-1])
  rows = None
  if interleaved:
    if shape[0] % (2 * interleaved):
      raise ValueError(f"{path}: {tensor.name} has {shape[0]} rows for {interleaved} heads")
    rows = np.arange(shape[0]).reshape(interleaved, -1, 2).swapaxes(1, 2).reshape(-1)
  if kind in _PLAIN:
    data = tensor.data.view(_PLAIN[kind]) if kind == GGMLQuantizationType.BF16 else tensor.data
    data = data.reshape(shape)

    def read_plain(index: Index) -> np.ndarray:
      return data[index] if rows is None else data[rows[index[0]]][:, *index[1:]]

    return LazyTensor(shape, _PLAIN[kind], read_plain, path)

  block, block_bytes = gguf_format.GGML_QUANT_SIZES[kind]
  blocks = tensor.data.reshape(*shape[:-1], shape[-1] // block * block_bytes)
  try:
    dequantize(blocks.reshape(-1)[:block_bytes], kind)
  except NotImplementedError as error:
    raise NotImplementedError(
      f"{path}: {tensor.name} is quantised as {kind.name}, which cannot be dequantised"
    ) from error

  def read(index: Index) -> np.ndarray:
    start, stop, _ = index[-1].indices(shape[-1])
    first, last = start // block, -(-stop // block)
    packed = blocks if rows is None else blocks[rows[index[0]]]
    lead = index[:-1] if rows is None else (slice(None), *index[1:-1])
    packed = packed[(*lead, slice(first * block_bytes, last * block_bytes))]
    values = dequantize(np.ascontiguousarray(packed), kind)
    return values[..., start - first * block : stop - first * block]

  return LazyTensor(shape, np.dtype(np.float32), read, path)
