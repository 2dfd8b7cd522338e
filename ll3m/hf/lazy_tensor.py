"""Tensors of a checkpoint on disk, read piece by piece: what all file formats have in common."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

Index = tuple[slice, ...]

# Transposing 16 rows at a time keeps the lines being written in the cache: 2.8 GB/s for bf16
# where numpy's own strided copy reaches 0.3 (one core of the machine that the demo runs on).
_TRANSPOSE_ROWS = 16
_LOOKED_AT = 2**16  # values


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor whose values stay on disk until they are asked for.

  Attributes:
    shape: its shape.
    dtype: of what `read` gives.
    read: takes one slice (step 1) per axis and gives that part; it may be a view of a mapped
      file, so whoever keeps it copies it.
    source: the file that holds it, for messages.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]
  source: Path

  @property
  def nbytes(self) -> int:
    """Its size in bytes, as `read` gives it."""
    return math.prod(self.shape) * self.dtype.itemsize


def mapped_tensor(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> LazyTensor:
  """Describes a tensor that lies in a file as plain values, in C order.

  The file is mapped for each read and let go with the last view of it, so that what was read
  counts as page cache and not as the process's own memory.

  Args:
    path: the file.
    dtype: of the values, little-endian.
    shape: of the tensor.
    offset: of its first value, in bytes.
  """

  def read(index: Index) -> np.ndarray:
    if not math.prod(shape):
      return np.empty(shape, dtype)[index]
    return np.asarray(np.memmap(path, dtype, mode="r", offset=offset, shape=shape)[index])

  return LazyTensor(shape, dtype, read, path)


def read_part(
  tensor: LazyTensor, index: Index, *, transpose: bool = False, dtype: np.dtype | None = None
) -> np.ndarray:
  """Copies a part of a tensor into memory.

  Args:
    tensor: what to read.
    index: the part of the RESULT, one slice per axis.
    transpose: the result is the tensor's transpose.
    dtype: of the result; None keeps the tensor's. Rounds to nearest even.

  Returns:
    A C-contiguous array of its own.

  Raises:
    ValueError: a finite value does not fit the dtype.
  """
  view = tensor.read(index[::-1] if transpose else index)
  return arrange(view, transpose, np.dtype(dtype or tensor.dtype), str(tensor.source))


def arrange(values: np.ndarray, transpose: bool, dtype: np.dtype, origin: str) -> np.ndarray:
  """Copies values to a C-contiguous array of another orientation or dtype.

  Args:
    values: any view.
    transpose: the result is its transpose.
    dtype: of the result. Rounds to nearest even.
    origin: where the values are from, for messages.

  Raises:
    ValueError: a finite value does not fit the dtype.
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
        f"{lost} values in {origin} do not fit {dtype.name}, whose largest is "
        f"{float(ml_dtypes.finfo(dtype).max):.4g}; use another `dtype`"
      )
  return result


def all_finite(values: np.ndarray) -> bool:
  """Says whether floating-point values hold neither NaN nor infinity.

  It looks at the bits, in pieces that stay in the cache: NumPy's own test of bfloat16 is slow.
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
  """Says what a file is that ought to hold weights, if it is one of the usual mistakes."""
  with path.open("rb") as file:
    start = file.read(64).lstrip().lower()
  if start.startswith(b"version https://git-lfs"):
    return "a Git LFS pointer, not the file itself (fetch it with `git lfs pull`)"
  if start.startswith((b"<!doctype", b"<html")):
    return "an HTML page (a login or error page was saved in its place)"
  if not start:
    return "empty"
  return None
