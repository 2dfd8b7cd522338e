"""GGUF files: weights of any quantisation, config and tokenizer.

A GGUF file holds metadata as key-value pairs, and tensors, most of them quantised in blocks along
their last axis. llama.cpp's converter changes some of them; see `ll3m.hf.gguf_architectures`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf as gguf_format
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from ll3m import families
from ll3m.core.model_config import did_you_mean
from ll3m.families.family import Family
from ll3m.hf import gguf_rope
from ll3m.hf.gguf_architectures import ARCHITECTURES, NAMES, Architecture
from ll3m.hf.gguf_metadata import Metadata, shortest_decimal
from ll3m.hf.gguf_tokenizer import generation_config, token_ids, tokenizer_files
from ll3m.hf.lazy_tensor import Index, LazyTensor, describe_wrong_file

_PATTERN = "attention.sliding_window_pattern"
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


class _Reader(GGUFReader):
  """A reader that slices an array instead of a memmap.

  It opens Gemma 3's 262,144 tokens in 8 s instead of 23.
  """

  @property
  def data(self) -> np.ndarray:
    return self._data

  @data.setter
  def data(self, mapped: np.ndarray) -> None:
    self._data = np.asarray(mapped)


def open_gguf(path: Path) -> GgufFile:
  """Reads a file's metadata and describes its tensors.

  Raises:
    ValueError: The file is not a GGUF file, is truncated, or lacks required metadata.
    NotImplementedError: The architecture or the quantisation is not supported.
  """
  try:
    reader = _Reader(path)
  except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
    wrong = describe_wrong_file(path) or f"truncated or not a GGUF file ({error})"
    raise ValueError(f"{path} is {wrong}") from error
  metadata = Metadata(path, reader)
  if metadata.get("general.type", "model") == "adapter":
    raise NotImplementedError(
      f"{path} holds a {metadata.get('adapter.type', 'LoRA')} adapter, not a model: merge it into "
      f"its base model (llama.cpp's llama-export-lora) and give the merged file"
    )
  name = metadata.get("general.architecture")
  if name not in ARCHITECTURES:
    raise NotImplementedError(
      f"{path} has the architecture {name!r}{did_you_mean(str(name), ARCHITECTURES)}; supported "
      f"are {', '.join(ARCHITECTURES)}"
    )
  architecture = ARCHITECTURES[name]
  if metadata.get("split.count", 1) > 1:
    raise NotImplementedError(
      f"{path} is one part of a split model; merge the parts with llama-gguf-split"
    )
  if metadata.get("{arch}.expert_count", 0):
    raise NotImplementedError(f"{path} is a mixture of experts, which is not supported")
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _hf_config(metadata, tensors, families.FAMILIES[name], architecture)
  metadata.check(config, _own_keys(architecture))
  lazy = {}
  for tensor in reader.tensors:
    if tensor.name not in gguf_rope.TENSORS:
      lazy |= _hf_tensor(path, tensor, config, architecture)
  return GgufFile(
    config, generation_config(metadata.get), lazy, tokenizer_files(metadata.get, path)
  )


def _hf_config(
  metadata: Metadata, tensors: Mapping[str, Any], family: Family, architecture: Architecture
) -> dict[str, Any]:
  """Builds a config.json from the metadata."""
  if "token_embd.weight" not in tensors:
    raise ValueError(f"{metadata.path} lacks the tensor token_embd.weight")
  num_heads = _one_for_all_layers(metadata, "{arch}.attention.head_count")
  d_model = metadata.require("{arch}.embedding_length")
  head_dim = _one_for_all_layers(metadata, "{arch}.attention.key_length", d_model // num_heads)
  rotary_dim = _one_for_all_layers(metadata, "{arch}.rope.dimension_count", head_dim)
  config = {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    "hidden_size": d_model,
    "intermediate_size": _one_for_all_layers(metadata, "{arch}.feed_forward_length"),
    "num_hidden_layers": metadata.require("{arch}.block_count"),
    "num_attention_heads": num_heads,
    "num_key_value_heads": _one_for_all_layers(
      metadata, "{arch}.attention.head_count_kv", num_heads
    ),
    "head_dim": head_dim,
    "max_position_embeddings": metadata.require("{arch}.context_length"),
    "rms_norm_eps": shortest_decimal(metadata.require("{arch}.attention.layer_norm_rms_epsilon")),
    "hidden_act": next(iter(family.activations)),
    "tie_word_embeddings": "output.weight" not in tensors,
  }
  config |= gguf_rope.read_rope(metadata, tensors, rotary_dim)
  if "rotary_fraction" in family.switches:
    config["partial_rotary_factor"] = rotary_dim / head_dim
  for key in architecture.keys:
    value = metadata.get(f"{{arch}}.{key.gguf}", key.default)
    config[key.hf] = (shortest_decimal(value) if isinstance(value, float) else value) or None
  if architecture.scaled_layers:
    is_scaled = config["num_hidden_layers"] == architecture.scaled_layers
    config["query_pre_attn_scalar"] = d_model // num_heads if is_scaled else head_dim
  if architecture.period:
    config["layer_types"] = _layer_types(metadata, config, architecture.period)
  return config | token_ids(metadata.get)


def _own_keys(architecture: Architecture) -> list[str]:
  """Returns the metadata keys that only some architectures have."""
  keys = [key.gguf for key in architecture.keys] + [_PATTERN] * (architecture.period is not None)
  return [f"{{arch}}.{key}" for key in keys]


def _layer_types(metadata: Metadata, config: Mapping[str, Any], period: int) -> list[str]:
  """Returns the type of each layer; a file lists which have a window, or has a period.

  Raises:
    ValueError: The file lists another number of layers.
  """
  num_layers = config["num_hidden_layers"]
  given = metadata.get(f"{{arch}}.{_PATTERN}", period)
  if isinstance(given, list):
    slides = given
  else:  # llama.cpp: without a period, all have a window
    slides = [not given or (i + 1) % given != 0 for i in range(num_layers)]
  if len(slides) != num_layers:
    raise ValueError(
      f"{metadata.path} has {_PATTERN} for {len(slides)} layers, expected {num_layers}"
    )
  return ["sliding_attention" if slide else "full_attention" for slide in slides]


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
      f"{metadata.path} has {metadata.full(key)}={found}; layers of different sizes are not "
      f"supported"
    )
  size = min(sizes, default=0)
  if size < 1:
    raise ValueError(
      f"{metadata.path} has {metadata.full(key)}={found}, expected a positive number"
    )
  return size


def _hf_tensor(
  path: Path, tensor: Any, config: Mapping[str, Any], architecture: Architecture
) -> dict[str, LazyTensor]:
  """Returns a tensor as the Hugging Face model has it, by its name there."""
  name, heads = NAMES.get(tensor.name, tensor.name), None
  layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
  if layer and layer[2] in architecture.layer_names:
    name = f"model.layers.{layer[1]}.{architecture.layer_names[layer[2]]}.{layer[3]}"
    if architecture.interleaved:
      heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(layer[2])
  found = _lazy_tensor(path, tensor, config[heads] if heads else None)
  if architecture.norm_offset and name.endswith("norm.weight"):
    found = _minus(found, np.float32(architecture.norm_offset))
  return {name: found}


def _minus(tensor: LazyTensor, number: np.float32) -> LazyTensor:
  """Returns a tensor less a number, in float32."""

  def read(index: Index) -> np.ndarray:
    return tensor.read(index).astype(np.float32) - number

  return dataclasses.replace(tensor, dtype=np.dtype(np.float32), read=read)


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
