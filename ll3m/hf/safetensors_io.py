"""Safetensors files, read and written lazily (https://huggingface.co/docs/safetensors).

A file consists of the length of a JSON header in eight bytes, the header (each tensor's dtype,
shape and position), and the values, little-endian and in C order. Reading maps the file. Writing
fixes every tensor's position in advance, so tensors can be written in any order and in pieces.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ll3m.hf.lazy_tensor import LazyTensor, describe_wrong_file, mapped_tensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
  """Reads the header of a file and describes its tensors.

  Raises:
    ValueError: The file is not a safetensors file, is truncated, or has an inconsistent header.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, max(size - 8, 0)):
      wrong = describe_wrong_file(path) or "truncated or not a safetensors file"
      raise ValueError(f"{path} is {wrong}")
    try:
      header = json.loads(file.read(length))
    except ValueError as error:
      raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from error
  if not isinstance(header, dict):
    raise ValueError(f"{path} is not a safetensors file: its header is not an object")
  header.pop("__metadata__", None)
  tensors, last = {}, 0
  for name, entry in header.items():
    tensors[name], end = _describe(path, name, entry, 8 + length)
    last = max(last, end)
  if size != 8 + length + last:
    kind = "truncated" if size < 8 + length + last else "longer than its header says"
    raise ValueError(f"{path} is {kind}: expected {8 + length + last} bytes, got {size}")
  return tensors


def _describe(path: Path, name: str, entry: Any, base: int) -> tuple[LazyTensor, int]:
  try:
    code, shape = str(entry["dtype"]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: the header's entry for {name} is malformed") from error
  if not all(type(n) is int for n in (begin, end, *shape)):
    raise ValueError(f"{path}: the header's entry for {name} is malformed")
  if code not in _DTYPES:
    raise NotImplementedError(
      f"{path}: {name} has the dtype {code}, expected F64, F32, F16 or BF16; quantised weights are "
      f"not supported"
    )
  dtype = np.dtype(_DTYPES[code])
  if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(
      f"{path}: {name} should hold {math.prod(shape) * dtype.itemsize} bytes for shape "
      f"{list(shape)} of {code}, but the header gives {end - begin}"
    )
  return mapped_tensor(path, dtype, shape, base + begin), end


class TensorInfo(NamedTuple):
  """Shape and dtype of a tensor to be written."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """The size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def _header(tensors: Iterable[tuple[str, TensorInfo]]) -> tuple[bytes, dict[str, int]]:
  """Builds a file's header and returns it with the position of each tensor in the file."""
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
  offsets, end = {}, 0
  for name, info in tensors:
    offsets[name] = end
    entries[name] = {
      "dtype": _CODES[info.dtype],
      "shape": list(info.shape),
      "data_offsets": [end, end + info.nbytes],
    }
    end += info.nbytes
  text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  header = struct.pack("<Q", len(text)) + text
  return header, {name: len(header) + offset for name, offset in offsets.items()}


class SafetensorsWriter:
  """Writer of a model as one safetensors file, or several with an index, in any order of pieces.

  Within a file, tensors are sorted as the safetensors library sorts them: by descending dtype size,
  then by name. The index is written on exit from the `with` block, if nothing was raised and every
  value was written. As in transformers, a single file has no index.
  """

  def __init__(self, directory: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int):
    """Creates the files at their full size.

    Args:
      directory: An existing folder.
      tensors: All tensors that will be written, by name.
      max_shard_bytes: Maximum size of the tensors in one file, in bytes; a larger tensor gets its
        own file.

    Raises:
      ValueError: max_shard_bytes is not positive.
    """
    if max_shard_bytes <= 0:
      raise ValueError(f"the maximum shard size must be positive, got {max_shard_bytes} bytes")
    self._directory = directory
    self._tensors = dict(tensors)
    self._unwritten = {name: info.nbytes for name, info in tensors.items()}
    self._files: dict[str, int] = {}
    self._places: dict[str, tuple[str, int]] = {}
    shards = _split(self._tensors, max_shard_bytes)
    for number, names in enumerate(shards, start=1):
      file = (
        SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
      )
      names = sorted(names, key=lambda name: (-self._tensors[name].dtype.itemsize, name))
      header, offsets = _header((name, self._tensors[name]) for name in names)
      descriptor = os.open(directory / file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
      self._files[file] = descriptor
      os.pwrite(descriptor, header, 0)
      os.ftruncate(descriptor, len(header) + sum(self._tensors[name].nbytes for name in names))
      self._places |= {name: (file, offset) for name, offset in offsets.items()}

  def write(self, name: str, values: np.ndarray, start_row: int = 0) -> None:
    """Writes a tensor, or consecutive rows of it.

    Raises:
      ValueError: The dtype or the shape differs from that given to the constructor.
    """
    info = self._tensors[name]
    if values.dtype != info.dtype or values.shape[1:] != info.shape[1:]:
      raise ValueError(
        f"{name}: expected {info.dtype} of shape {info.shape}, got {values.dtype} {values.shape}"
      )
    file, offset = self._places[name]
    offset += start_row * math.prod(info.shape[1:]) * info.dtype.itemsize
    data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    self._unwritten[name] -= len(data)
    while data:  # a single call writes at most 2 GiB
      count = os.pwrite(self._files[file], data, offset)
      data, offset = data[count:], offset + count

  def __enter__(self) -> "SafetensorsWriter":
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    for descriptor in self._files.values():
      os.close(descriptor)
    if kind is not None:
      return
    if incomplete := sorted(name for name, count in self._unwritten.items() if count):
      raise ValueError(f"tensors were not written completely: {', '.join(incomplete)}")
    if len(self._files) == 1:
      return
    index = {
      "metadata": {"total_size": sum(info.nbytes for info in self._tensors.values())},
      "weight_map": {name: self._places[name][0] for name in sorted(self._places)},
    }
    (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _split(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
  """Splits the tensors into consecutive groups of at most max_bytes each."""
  shards: list[list[str]] = []
  room = 0
  for name, info in tensors.items():
    if not shards or info.nbytes > room:
      shards.append([])
      room = max_bytes
    shards[-1].append(name)
    room -= info.nbytes
  return shards
