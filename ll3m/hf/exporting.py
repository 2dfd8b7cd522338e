"""Exports an LL3M model as a Hugging Face folder, by inverting the rules of conversion."""

import collections
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from ll3m import families
from ll3m.core import parameter_store
from ll3m.core.checkpoint import Checkpoint
from ll3m.core.model_config import ModelConfig
from ll3m.core.model_folder import require_empty, require_space
from ll3m.core.object_store import is_remote
from ll3m.core.parameter_store import read_slices
from ll3m.core.progress import byte_bar
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import Tokenizer, load_tokenizer
from ll3m.data.tokenizer_files import ENCODER, SENTENCEPIECE
from ll3m.families.family import Family
from ll3m.families.tensor_rules import TensorSpec, expected_tensors
from ll3m.hf.lazy_tensor import arrange
from ll3m.hf.model_files import CONFIG_NAME, GENERATION_CONFIG_NAME
from ll3m.hf.safetensors_io import SafetensorsWriter, TensorInfo
from ll3m.hf.token_settings import TOKEN_KEYS, token_ids
from ll3m.hf.validation import check_parameters

_DTYPES = ("dtype", "torch_dtype")  # the second is the name before 2025
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Export(NamedTuple):
  """Counts of what an export wrote, and how long it took.

  Attributes:
    tensors: Number of tensors.
    parameters: Number of values in all tensors.
    dtypes: Names of the tensors' dtypes, the most frequent first.
    nbytes: Size of the tensors in bytes.
    seconds: Duration of the export.
  """

  tensors: int
  parameters: int
  dtypes: tuple[str, ...]
  nbytes: int
  seconds: float


def parse_size(text: str) -> int:
  """Parses a size in Hugging Face's notation: 5GB, 200MB, 1000.

  Raises:
    ValueError: The text is not a positive size.
  """
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|)", text.strip().upper())
  size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
  if size <= 0:
    raise ValueError(f"expected a size such as 5GB or 200MB, got {text!r}")
  return size


def export_checkpoint(
  checkpoint: Checkpoint,
  output: str | os.PathLike,
  *,
  dtype: np.dtype | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> Export:
  """Exports a checkpoint without loading all of it into memory; see `export_model`."""
  return export_model(
    parameter_store.open_parameters(checkpoint.params_path),
    output,
    family=checkpoint.family,
    config=checkpoint.config,
    tokenizer=_load_tokenizer(checkpoint),
    tokenizer_files=checkpoint.tokenizer_files,
    config_files=checkpoint.config_files,
    origin=str(checkpoint.params_path),
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
  )


def export_model(
  arrays: Mapping[str, parameter_store.StoredArray | jax.Array],
  output: str | os.PathLike,
  *,
  family: str,
  config: ModelConfig,
  tokenizer: Tokenizer | None,
  tokenizer_files: Mapping[str, bytes],
  config_files: Mapping[str, bytes],
  origin: str = "the model",
  dtype: np.dtype | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> Export:
  """Exports a model, with a progress bar on stderr; the folder appears only when it is complete.

  Args:
    arrays: The parameters by "module/name".
    output: The folder to create, on a local disk.
    family: The name of the family.
    config: The architecture.
    tokenizer: The tokenizer whose token ids config.json gets; None keeps the published ids.
    tokenizer_files: The contents of the tokenizer's files, by file name.
    config_files: The contents of the published config.json and generation_config.json, if any.
    origin: The name of the model in messages.
    dtype: The dtype of every tensor; None keeps each tensor's own.
    max_shard_bytes: The maximum size of the tensors in one file, in bytes.

  Returns:
    The counts to report.

  Raises:
    ValueError: The folder is not empty, or the parameters do not match the config, are damaged, or
      do not fit the dtype.
  """
  start = time.perf_counter()
  if is_remote(output):
    raise ValueError(f"models are exported to a local disk, got {output}")
  output = Path(output)
  require_empty(epath.Path(output))
  found = families.FAMILIES[family]
  check_parameters(found, config, arrays, origin)
  specs = expected_tensors(found.rules, config)
  tensors = _tensors(arrays, specs, dtype)
  # Norms may have another dtype, so config.json names the embedding's.
  torch_dtype = next(iter(tensors.values())).dtype.name
  files = _config_files(config_files, found, config, torch_dtype, tokenizer)
  files |= _tokenizer_files(tokenizer_files, tokenizer)
  nbytes = sum(info.nbytes for info in tensors.values())

  unfinished = output.with_name(f".{output.name}.unfinished")
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir(parents=True)
  try:
    require_space(epath.Path(output), nbytes)
    with SafetensorsWriter(unfinished, tensors, max_shard_bytes) as writer:
      _write_tensors(arrays, specs, tensors, writer)
    for name, content in files.items():
      (unfinished / name).write_bytes(content)
    unfinished.rename(output)
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise
  count = sum(int(np.prod(info.shape)) for info in tensors.values())
  dtypes = collections.Counter(info.dtype.name for info in tensors.values())
  names = tuple(name for name, _ in dtypes.most_common())
  return Export(len(tensors), count, names, nbytes, time.perf_counter() - start)


def _tensors(
  arrays: Mapping[str, parameter_store.StoredArray | jax.Array],
  specs: Mapping[str, TensorSpec],
  dtype: np.dtype | None,
) -> dict[str, TensorInfo]:
  """Returns shape and dtype of every tensor to write."""
  tensors: dict[str, TensorInfo] = {}
  for spec in specs.values():
    own = np.dtype(dtype or arrays[spec.ours].dtype)
    if spec.tensor in tensors:  # shared by several parameters
      above = tensors[spec.tensor]
      # Promote through float32, because NumPy has no common type of bfloat16 and float16.
      if above.dtype != own:
        own = np.promote_types(np.promote_types(np.float32, above.dtype), own)
      shape = (above.shape[0] + spec.shape[0], *spec.shape[1:])
    else:
      shape = spec.shape
    tensors[spec.tensor] = TensorInfo(shape, own)
  return tensors


def _write_tensors(
  arrays: Mapping[str, parameter_store.StoredArray | jax.Array],
  specs: Mapping[str, TensorSpec],
  tensors: Mapping[str, TensorInfo],
  writer: SafetensorsWriter,
) -> None:
  """Writes every tensor, with one block of layers in memory at a time."""
  names: dict[str, list[str]] = {}
  for name, spec in specs.items():  # layers are in order
    names.setdefault(spec.ours, []).append(name)
  total = sum(info.nbytes for info in tensors.values())
  with byte_bar(total, "export") as bar:
    for path, layers in names.items():
      stacked = specs[layers[0]].layer is not None
      array = arrays[path]  # an unstacked parameter counts as one layer
      blocks = read_slices(array) if stacked else [(0, np.asarray(array[...])[None])]
      for start, values in blocks:
        for layer, value in enumerate(values, start):
          spec = specs[layers[layer]]
          info = tensors[spec.tensor]
          rows = arrange(value, spec.transpose, info.dtype, path)
          writer.write(spec.tensor, rows, spec.first_row)
          bar.update(rows.nbytes)


def _load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
  """Loads the tokenizer saved with a checkpoint; None if it is missing or cannot be loaded."""
  if checkpoint.tokenizer_dir is None:
    return None
  try:
    return load_tokenizer(
      TokenizerConfig(),
      checkpoint_dir=checkpoint.tokenizer_dir,
      source_dir=checkpoint.source_dir,
    )
  except (ValueError, OSError, NotImplementedError) as error:
    logging.warning("config.json keeps the token ids of its source: %s", error)
    return None


def _tokenizer_files(
  files: Mapping[str, bytes], tokenizer: Tokenizer | None
) -> Mapping[str, bytes]:
  """Returns the tokenizer's files unchanged, except for a bare SentencePiece model.

  That gets a tokenizer.json, because transformers would split some texts differently without it.
  """
  if tokenizer is not None and SENTENCEPIECE in files and ENCODER not in files:
    return tokenizer.files()
  return files


def _config_files(
  published: Mapping[str, bytes],
  family: Family,
  config: ModelConfig,
  dtype: str,
  tokenizer: Tokenizer | None,
) -> dict[str, bytes]:
  """Builds config.json and generation_config.json; unchanged ones keep their published bytes."""
  source, generation = (
    json.loads(published[name]) if name in published else None
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME)
  )
  # transformers generates with the second file if it exists, else with config.json.
  settings = source if generation is None else generation
  if tokenizer is None:
    ids = {key: value for key, value in (settings or {}).items() if key in TOKEN_KEYS}
  else:
    ids = token_ids(settings or {}, tokenizer)
  own = {key: source[key] for key in TOKEN_KEYS if key in source} if source else {}
  if source is not None and _describes(source, family, config):
    # In the source's form, whose spelling of some keys other programs may need.
    hf = source if own or generation else source | ids
    named = [key for key in _DTYPES if key in source]
  else:
    hf, named = family.to_hf_config(config) | ids | own, []
  hf = hf | dict.fromkeys(named or _DTYPES, dtype)
  if generation is None:
    written = _json({"_from_model_config": True} | ids)
  elif generation | ids == generation:  # unchanged: keep the published bytes
    written = published[GENERATION_CONFIG_NAME]
  else:
    written = _json(generation | ids)
  unchanged = source is not None and hf == source
  config_bytes = published[CONFIG_NAME] if unchanged else _json(hf)
  return {CONFIG_NAME: config_bytes, GENERATION_CONFIG_NAME: written}


def _describes(hf: Mapping[str, Any], family: Family, config: ModelConfig) -> bool:
  """Returns whether a config.json describes this architecture."""
  try:
    return families.from_hf_config(hf) == (family, config)
  except (ValueError, NotImplementedError):
    return False


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()
