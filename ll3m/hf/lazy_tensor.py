"""Tensors of a checkpoint on disk, read piece by piece; common to all file formats."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

Index = tuple[slice, ...]

# Transposing 16 rows at a time keeps the cache lines being written in the cache: 2.8 GB/s for
# bfloat16, whereas NumPy's own strided copy reaches 0.3 (one core of the demo's machine).
_TRANSPOSE_ROWS = 16
_LOOKED_AT = 2**16  # values per test for NaN and infinities


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor whose values stay on disk until they are read.

  Attributes:
    shape: The shape.
    dtype: The dtype of the arrays that `read` returns.
    read: Function from one slice (step 1) per axis to that part of the tensor. The result may be a
      view of a mapped file; copy it to keep it.
    source: The file that holds the tensor, for messages.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]
  source: Path

  @property
  def nbytes(self) -> int:
    """The size in bytes in `dtype`."""
    return math.prod(self.shape) * self.dtype.itemsize


def mapped_tensor(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> LazyTensor:
  """Describes a tensor stored in a file as plain values in C order.

  Each read maps the file, and the mapping ends with its last view. The pages read therefore count
  as page cache, not as the process's own memory.

  Args:
    path: The file.
    dtype: The dtype of the values, little-endian.
    shape: The shape of the tensor.
    offset: The position of the first value, in bytes.
  """

  def read(index: Index) -> np.ndarray:
    if not math.prod(shape):
      return np.empty(shape, dtype)[index]
    return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=shape)[index])

  return LazyTensor(shape, dtype, read, path)


def rows_of(tensor: LazyTensor, first: int, shape: tuple[int, ...]) -> LazyTensor:
  """Returns consecutive rows of a tensor as a tensor of its own.

  Args:
    tensor: The tensor.
    first: The first row.
    shape: The shape of the result.
  """

  def read(index: Index) -> np.ndarray:
    start, stop, _ = index[0].indices(shape[0])
    return tensor.read((slice(first + start, first + stop), *index[1:]))

  return LazyTensor(shape, tensor.dtype, read, tensor.source)


def read_part(
  tensor: LazyTensor, index: Index, *, transpose: bool = False, dtype: np.dtype | None = None
) -> np.ndarray:
  """Copies a part of a tensor into memory.

  Args:
    tensor: The tensor to read.
    index: The part of the *result*, one slice per axis.
    transpose: Whether the result is the tensor's transpose.
    dtype: The dtype of the result, rounded to nearest even; None keeps the tensor's.

  Returns:
    A C-contiguous copy.

  Raises:
    ValueError: A finite value does not fit the dtype.
  """
  view = tensor.read(index[::-1] if transpose else index)
  return arrange(view, transpose, np.dtype(dtype or tensor.dtype), str(tensor.source))


def arrange(values: np.ndarray, transpose: bool, dtype: np.dtype, origin: str) -> np.ndarray:
  """Copies values to a C-contiguous array of another orientation or dtype.

  Args:
    values: Any view.
    transpose: Whether the result is the transpose of the values.
    dtype: The dtype of the result, rounded to nearest even.
    origin: The source of the values, for messages.

  Raises:
    ValueError: A finite value does not fit the dtype.
  """
  with np.errstate(over="ignore"):  # checked below
    if transpose:
      result = np.empty(values.shape[::-1], dtype)
      if dtype == values.dtype:  # NumPy copies integers faster than bfloat16
        bits = np.dtype(f"u{dtype.itemsize}")
        _copy_transposed(values.view(bits), result.view(bits))
      else:
        _copy_transposed(values, result)
    else:
      result = np.empty(values.shape, dtype)
      result[...] = values
  if dtype.itemsize == 2 and dtype != values.dtype:
    lost = int(np.isinf(result).sum()) - int(np.isinf(values).sum())
    if lost:
      raise ValueError(
        f"{lost} values in {origin} do not fit {dtype.name}, whose maximum is "
        f"{float(ml_dtypes.finfo(dtype).max):.4g}; use another `dtype`"
      )
  return result


def all_finite(values: np.ndarray) -> bool:
  """Returns whether floating-point values hold neither NaN nor infinity.

  It tests the bits in pieces that fit in the cache, because NumPy's own test of bfloat16 is slow.
  """
  info = ml_dtypes.finfo(values.dtype)
  if values.dtype.itemsize == 1 or info.bits not in (16, 32, 64):
    return bool(np.isfinite(values.astype(np.float32)).all())
  bits = np.dtype(f"u{values.dtype.itemsize}")
  sign = bits.type(1 << (info.bits - 1))
  infinity = np.array(np.inf, values.dtype).view(bits)
  flat = values.reshape(-1).view(bits)
  return all(
    ((flat[start : start + _LOOKED_AT] & ~sign) < infinity).all()
    for start in range(0, flat.size, _LOOKED_AT)
  )


def _copy_transposed(values: np.ndarray, result: np.ndarray) -> None:
  for start in range(0, values.shape[0], _TRANSPOSE_ROWS):
    rows = slice(start, start + _TRANSPOSE_ROWS)
    result[:, rows] = values[rows].T


def describe_wrong_file(path: Path) -> str | None:
  """Describes a file that was saved in place of weights by a common mistake; else returns None."""
  with path.open("rb") as file:
    start = file.read(64).lstrip().lower()
  if start.startswith(b"version https://git-lfs"):
    return "a Git LFS pointer, not the file itself (fetch it with `git lfs pull`)"
  if start.startswith((b"<!doctype", b"<html")):
    return "an HTML page (a login or error page was saved in place of the file)"
  if not start:
    return "empty"
  return None
