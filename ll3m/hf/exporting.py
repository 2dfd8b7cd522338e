"""Writes a model of ours as a Hugging Face folder: the rules of conversion run backwards."""

import collections
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from absl import logging
from etils import epath

from ll3m import families
from ll3m.core import parameter_store
from ll3m.core.checkpoint import Checkpoint
from ll3m.core.progress import byte_bar
from ll3m.core.storage import is_remote
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import Tokenizer, load_tokenizer
from ll3m.data.tokenizer_files import ENCODER, SENTENCEPIECE
from ll3m.hf.family import Family
from ll3m.hf.mapping import TensorSpec, expected_tensors
from ll3m.hf.matching import check_parameters
from ll3m.hf.model_files import CONFIG_NAME, GENERATION_CONFIG_NAME
from ll3m.hf.tensors import arrange
from ll3m.hf.token_settings import TOKEN_KEYS, token_ids
from ll3m.hf.weights import SafetensorsWriter, TensorInfo

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Export(NamedTuple):
  """What was written.

  Attributes:
    tensors: Number of tensors.
    parameters: Number of values in them.
    dtypes: Names of their dtypes, the most frequent first.
    nbytes: Size of the tensors in bytes.
    seconds: Time that it took.
  """

  tensors: int
  parameters: int
  dtypes: tuple[str, ...]
  nbytes: int
  seconds: float


def parse_size(text: str) -> int:
  """Reads a size as Hugging Face writes it: 5GB, 200MB, 1000.

  Raises:
    ValueError: not such a size, or nothing.
  """
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|)", text.strip().upper())
  size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
  if size <= 0:
    raise ValueError(f"expected a size such as 5GB or 200MB, got {text!r}")
  return size


def export_model(
  checkpoint: Checkpoint,
  output: str | os.PathLike,
  *,
  dtype: np.dtype | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> Export:
  """Exports a model, with a progress bar on stderr; the folder appears only when it is complete.

  Args:
    checkpoint: what to export.
    output: the folder to make, on a local disk.
    dtype: to cast every tensor to; None keeps each as it is.
    max_shard_bytes: tensor bytes in one file.

  Returns:
    Counts for the report.

  Raises:
    ValueError: the folder already holds something, the parameters are not those of the config,
      are damaged, or do not fit the dtype.
  """
  start = time.perf_counter()
  if is_remote(output):
    raise ValueError(f"an exported folder is written to a local disk, got {output}")
  output = Path(output)
  _check_output(output)
  family = families.FAMILIES[checkpoint.family]
  arrays = parameter_store.open_parameters(checkpoint.params_path)
  check_parameters(family, checkpoint.config, arrays, str(checkpoint.params_path))
  specs = expected_tensors(family.rules, checkpoint.config)
  tensors = {
    name: TensorInfo(spec.shape, np.dtype(dtype or arrays[spec.ours].dtype.numpy_dtype))
    for name, spec in specs.items()
  }
  tokenizer = _load_tokenizer(checkpoint)
  config_files = _config_files(checkpoint, family, tensors, tokenizer)
  nbytes = sum(info.nbytes for info in tensors.values())

  unfinished = output.with_name(f".{output.name}.unfinished")
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir(parents=True)
  try:
    free = shutil.disk_usage(unfinished).free
    if free < nbytes:
      raise ValueError(
        f"{output} needs {nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left"
      )
    with SafetensorsWriter(unfinished, tensors, max_shard_bytes) as writer:
      _write_tensors(checkpoint.params_path, arrays, specs, tensors, writer)
    for name, content in config_files.items():
      (unfinished / name).write_bytes(content)
    for name, content in _tokenizer_files(checkpoint, tokenizer).items():
      (unfinished / name).write_bytes(content)
    unfinished.rename(output)
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise
  count = sum(int(np.prod(info.shape)) for info in tensors.values())
  dtypes = collections.Counter(info.dtype.name for info in tensors.values())
  names = tuple(name for name, _ in dtypes.most_common())
  return Export(len(tensors), count, names, nbytes, time.perf_counter() - start)


def _check_output(output: Path) -> None:
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"the output folder {output} already holds something; give a new one")


def _write_tensors(
  params_path: epath.Path,
  arrays: Mapping[str, ts.TensorStore],
  specs: Mapping[str, TensorSpec],
  tensors: Mapping[str, TensorInfo],
  writer: SafetensorsWriter,
) -> None:
  """Writes every tensor, with one block of layers in memory."""
  names: dict[str, list[str]] = {}
  for name, spec in specs.items():  # layers come in order
    names.setdefault(spec.ours, []).append(name)
  total = sum(info.nbytes for info in tensors.values())
  with byte_bar(total, "export") as bar:
    for path, layers in names.items():
      stacked = specs[layers[0]].layer is not None
      for start, values in _blocks(params_path, path, arrays[path], stacked):
        for layer, value in enumerate(values, start):
          name = layers[layer]
          info = tensors[name]
          writer.write(name, arrange(value, specs[name].transpose, info.dtype, path))
          bar.update(info.nbytes)


def _blocks(
  directory: epath.Path, path: str, array: ts.TensorStore, stacked: bool
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first layer, values [layers, ...]); an unstacked parameter counts as one layer."""
  with parameter_store.naming(directory, path):
    if stacked:
      for part, values in parameter_store.read_slices(array):
        yield part.start, values
    else:
      yield 0, array.read().result()[None]


def _load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
  """Loads the tokenizer that travels with a checkpoint; None if there is none that works."""
  if checkpoint.tokenizer_dir is None:
    return None
  try:
    return load_tokenizer(
      TokenizerConfig(),
      checkpoint_dir=checkpoint.tokenizer_dir,
      source_dir=checkpoint.source_dir,
    )
  except (ValueError, OSError, NotImplementedError) as error:
    logging.warning("config.json names only the token ids of its source: %s", error)
    return None


def _tokenizer_files(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, bytes]:
  """Returns the tokenizer's files as they came, so that they mean what they meant.

  A bare SentencePiece model gets a tokenizer.json: transformers would cut some texts differently.
  """
  folder = checkpoint.tokenizer_dir
  files = {file.name: file.read_bytes() for file in folder.iterdir()} if folder else {}
  if tokenizer is not None and SENTENCEPIECE in files and ENCODER not in files:
    return tokenizer.files()
  return files


def _read_settings(folder: epath.Path | None, name: str) -> dict[str, Any] | None:
  """Reads a JSON file of a source's folder; None if there is none."""
  if folder is None or not (folder / name).exists():
    return None
  return json.loads((folder / name).read_text())


def _config_files(
  checkpoint: Checkpoint,
  family: Family,
  tensors: Mapping[str, TensorInfo],
  tokenizer: Tokenizer | None,
) -> dict[str, bytes]:
  """Makes config.json and generation_config.json."""
  source, generation = (
    _read_settings(checkpoint.source_dir, name) for name in (CONFIG_NAME, GENERATION_CONFIG_NAME)
  )
  # What transformers generates by: the second file, where there is one.
  settings = source if generation is None else generation
  if tokenizer is None:
    ids = {key: value for key, value in (settings or {}).items() if key in TOKEN_KEYS}
  else:
    ids = token_ids(settings or {}, tokenizer)
  own = {key: source[key] for key in TOKEN_KEYS if key in source} if source else {}
  config = family.to_hf_config(checkpoint.config) | ids | own
  # The embedding stands for the model where norms are kept in another type.
  dtype = next(iter(tensors.values())).dtype.name
  config |= {"dtype": dtype, "torch_dtype": dtype}  # today's key, and that of before 2025
  if generation is None:
    written = _json({"_from_model_config": True} | ids)
  elif generation | ids == generation:  # as it came, to the byte
    written = (checkpoint.source_dir / GENERATION_CONFIG_NAME).read_bytes()
  else:
    written = _json(generation | ids)
  return {CONFIG_NAME: _json(config), GENERATION_CONFIG_NAME: written}


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()
