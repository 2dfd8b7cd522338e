"""Reads PyTorch's `.bin` checkpoints without torch and without trusting pickle.

Since torch 1.6 such a file is a zip archive: `data.pkl` lists the tensors, and each storage is an
uncompressed member. The unpickler accepts only the names that rebuild tensors, and each of them
returns a description. It imports nothing and runs no code from the file.
"""

import collections
import dataclasses
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ll3m.hf.lazy_tensor import Index, LazyTensor, describe_wrong_file

SINGLE_NAME = "pytorch_model.bin"
INDEX_NAME = "pytorch_model.bin.index.json"

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, name length, extra length
_MAX_PICKLE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A flat array of values in a file; one or more tensors are views of it."""

  dtype: np.dtype
  offset: int
  count: int


def read_torch_bin(path: Path) -> dict[str, LazyTensor]:
  """Describes the tensors of a state dict saved by `torch.save`.

  Raises:
    ValueError: The file is not a torch checkpoint, is truncated, or contains anything but tensors.
    NotImplementedError: The file was written by torch before 1.6 (not a zip archive).
  """
  try:
    with zipfile.ZipFile(path) as archive:
      members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
      if "data.pkl" not in members or members["data.pkl"].file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"{path} is a zip archive, but was not written by torch.save")
      if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise NotImplementedError(f"{path} holds big-endian values, which are not supported")
      with archive.open(members["data.pkl"]) as file:
        state = _Unpickler(file, path, members).load()
  except zipfile.BadZipFile as error:
    with path.open("rb") as file:
      legacy = file.read(1) == b"\x80"
    if legacy:
      raise NotImplementedError(
        f"{path} was written by torch before 1.6 (a bare pickle), which is not supported; "
        f"load it with torch and save it as safetensors"
      ) from error
    wrong = describe_wrong_file(path) or "truncated or not a torch checkpoint"
    raise ValueError(f"{path} is {wrong}") from error
  except (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is not a plain torch state dict: {error}") from error
  if not isinstance(state, dict):
    raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
  for name, value in state.items():
    if not isinstance(name, str) or not isinstance(value, LazyTensor):
      raise ValueError(f"{path} is not a plain state dict: {name!r} is not a tensor")
  return dict(state)


class _Unpickler(pickle.Unpickler):
  """Unpickler that rebuilds descriptions of tensors and rejects every other name."""

  def __init__(self, file: Any, path: Path, members: dict[str, zipfile.ZipInfo]):
    super().__init__(file)
    self._path = path
    self._members = members

  def find_class(self, module: str, name: str) -> Any:
    # Each call returns a new object, so a file cannot alter the result of the next call.
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return lambda *args: self._tensor(*args[:4])
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, *_: data
    if module == "torch" and name in _STORAGES:
      return np.dtype(_STORAGES[name])
    raise ValueError(f"{self._path} refers to {module}.{name}; only plain tensors are supported")

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, count = pid
    info = self._members.get(f"data/{key}")
    if kind != "storage" or not isinstance(dtype, np.dtype) or type(count) is not int or not info:
      raise ValueError(f"{self._path}: the storage {key!r} of a tensor is missing")
    if info.compress_type != zipfile.ZIP_STORED:
      raise NotImplementedError(f"{self._path} holds compressed tensors, which are not supported")
    if info.file_size < count * dtype.itemsize:
      raise ValueError(
        f"{self._path}: storage {key} should hold {count * dtype.itemsize} bytes, "
        f"but holds {info.file_size}"
      )
    return _Storage(dtype, self._data_offset(info), count)

  def _data_offset(self, info: zipfile.ZipInfo) -> int:
    """Returns the position of a member's first byte.

    The lengths in the local header differ from those in the archive's directory.
    """
    with self._path.open("rb") as file:
      file.seek(info.header_offset)
      _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length

  def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
    numbers = (offset, *shape, *strides)
    valid = isinstance(storage, _Storage) and len(shape) == len(strides)
    if not valid or not all(isinstance(n, int) and n >= 0 for n in numbers):
      raise ValueError(f"{self._path}: the description of a tensor is malformed")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if all(shape) and last >= storage.count:
      raise ValueError(f"{self._path}: a tensor extends beyond its storage")
    return LazyTensor(
      tuple(shape), storage.dtype, _reader(self._path, storage, offset, shape, strides), self._path
    )


def _reader(
  path: Path, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Callable[[Index], np.ndarray]:
  def read(index: Index) -> np.ndarray:
    if not all(shape):
      return np.empty(shape, storage.dtype)[index]
    values = np.memmap(path, storage.dtype, "r", offset=storage.offset, shape=(storage.count,))
    steps = tuple(stride * storage.dtype.itemsize for stride in strides)
    view = np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
    return np.asarray(view[index])

  return read
