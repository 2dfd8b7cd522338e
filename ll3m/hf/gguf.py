"""GGUF files of the Llama architecture: weights of any quantisation, config and tokenizer.

A GGUF file holds metadata as key-value pairs, and tensors, most of them quantised in blocks along
their last axis. The q and k rows of Llama models are interleaved for the rotary convention of
llama.cpp: their order is (h, i, half), whereas Hugging Face's is (h, half, i).
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

from ll3m.hf.gguf_metadata import Metadata
from ll3m.hf.gguf_tokenizer import generation_config, token_ids, tokenizer_files
from ll3m.hf.lazy_tensor import Index, LazyTensor, describe_wrong_file

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
  """The contents of a GGUF file in Hugging Face's terms.

  Attributes:
    config: The equivalent config.json.
    generation_config: The equivalent generation_config.json: the special tokens, including all
      that end an answer.
    tensors: The tensors by Hugging Face name; dequantised (to float32) on reading.
    tokenizer_files: Functions that return the contents of the tokenizer's files, by file name.
  """

  config: dict[str, Any]
  generation_config: dict[str, Any]
  tensors: dict[str, LazyTensor]
  tokenizer_files: dict[str, Callable[[], bytes]]


def open_gguf(path: Path) -> GgufFile:
  """Reads a file's metadata and describes its tensors.

  Raises:
    ValueError: The file is not a GGUF file, is truncated, or lacks required metadata.
    NotImplementedError: The architecture or the quantisation is not supported.
  """
  try:
    reader = GGUFReader(path)
  except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
    wrong = describe_wrong_file(path) or f"truncated or not a GGUF file ({error})"
    raise ValueError(f"{path} is {wrong}") from error
  metadata = Metadata(path, reader)
  architecture = metadata.get("general.architecture")
  if metadata.get("general.type", "model") == "adapter":
    raise NotImplementedError(
      f"{path} holds a {metadata.get('adapter.type', 'LoRA')} adapter, not a model: merge it into "
      f"its base model (llama.cpp's llama-export-lora) and give the merged file"
    )
  if architecture != "llama":
    raise NotImplementedError(f"{path} has the architecture {architecture!r}, expected 'llama'")
  if metadata.get("split.count", 1) > 1:
    raise NotImplementedError(
      f"{path} is one part of a split model; merge the parts with llama-gguf-split"
    )
  if metadata.get("llama.expert_count", 0):
    raise NotImplementedError(f"{path} is a mixture of experts, which is not supported")
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  _drop_neutral_frequencies(tensors, path)
  config = _hf_config(metadata, tensors)
  metadata.check(config)
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
  return GgufFile(
    config, generation_config(metadata.get), lazy, tokenizer_files(metadata.get, path)
  )


def _hf_config(metadata: Metadata, tensors: dict[str, Any]) -> dict[str, Any]:
  """Builds a config.json from the metadata."""
  if "token_embd.weight" not in tensors:
    raise ValueError(f"{metadata.path} lacks the tensor token_embd.weight")
  num_heads = _one_for_all_layers(metadata, "llama.attention.head_count")
  d_model = metadata.require("llama.embedding_length")
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    "hidden_size": d_model,
    "intermediate_size": _one_for_all_layers(metadata, "llama.feed_forward_length"),
    "num_hidden_layers": metadata.require("llama.block_count"),
    "num_attention_heads": num_heads,
    "num_key_value_heads": _one_for_all_layers(
      metadata, "llama.attention.head_count_kv", num_heads
    ),
    "head_dim": metadata.get("llama.attention.key_length", d_model // num_heads),
    "max_position_embeddings": metadata.require("llama.context_length"),
    "rms_norm_eps": _decimal(metadata.require("llama.attention.layer_norm_rms_epsilon")),
    "rope_theta": _decimal(metadata.get("llama.rope.freq_base", 10_000.0)),
    "hidden_act": "silu",
    "tie_word_embeddings": "output.weight" not in tensors,
  }
  factor = _rope_factor(metadata)
  if factor != 1:
    config["rope_scaling"] = {"rope_type": "linear", "type": "linear", "factor": factor}
  return config | token_ids(metadata.get)


def _one_for_all_layers(metadata: Metadata, key: str, default: int | None = None) -> int:
  """Returns a positive size, which newer files may list for each layer.

  Raises:
    ValueError: The size is not positive, or is missing and has no default.
    NotImplementedError: The layers' sizes differ.
  """
  found = metadata.require(key) if default is None else metadata.get(key, default)
  sizes = set(found) if isinstance(found, list) else {found}
  if len(sizes) > 1:
    raise NotImplementedError(
      f"{metadata.path} has {key}={found}; layers of different sizes are not supported"
    )
  size = min(sizes, default=0)
  if size < 1:
    raise ValueError(f"{metadata.path} has {key}={found}, expected a positive number")
  return size


def _rope_factor(metadata: Metadata) -> float:
  """Returns the factor by which llama.cpp divides positions.

  Raises:
    ValueError: Keys contradict each other.
    NotImplementedError: The scaling is not linear.
  """
  keys = ("llama.rope.scaling.factor", "llama.rope.scale_linear")  # the latter until 2023
  given = {key: metadata.get(key, 0) for key in keys}
  factors = {_decimal(factor) for factor in given.values() if factor} or {1.0}
  kind = metadata.get("llama.rope.scaling.type", "linear")
  if kind not in ("none", "linear"):
    raise NotImplementedError(
      f"{metadata.path} has llama.rope.scaling.type={kind!r}; only 'none' and 'linear' are "
      f"supported"
    )
  if len(factors) > 1 or (kind == "none" and factors != {1.0}):
    said = ", ".join(f"{key}={factor}" for key, factor in given.items() if factor)
    raise ValueError(
      f"{metadata.path} has {said} and llama.rope.scaling.type={kind!r}, which contradict each "
      f"other"
    )
  return factors.pop()


def _drop_neutral_frequencies(tensors: dict[str, Any], path: Path) -> None:
  """Removes factors of the rotary frequencies if they all equal one.

  Raises:
    NotImplementedError: A factor differs from one, as in Llama 3.1 and longrope.
  """
  for name in [name for name in tensors if name.startswith("rope_")]:
    if not (np.asarray(tensors[name].data) == 1).all():
      raise NotImplementedError(
        f"{path} has {name}, which scales each rotary frequency (as Llama 3.1 does); only unscaled "
        f"and linearly scaled rotary embeddings are supported"
      )
    del tensors[name]


def _decimal(value: float) -> float:
  """Returns the shortest decimal that rounds to a float32: 1e-05, not 9.999999747e-06."""
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
