"""Parameters on disk in Orbax's layout, written and read in slices.

Orbax saves whole arrays, but a model that is larger than the host's memory must be written in
slices. So this module writes the files that Orbax's PyTree handler restores (zarr without OCDBT,
beside `_METADATA`), and reads both of Orbax's layouts.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from ll3m.core import checksums
from ll3m.core.object_store import is_remote

# Large layers are split into chunks of about this size, so that converting needs little memory.
CHUNK_BYTES = 64 * 2**20

_METADATA = "_METADATA"  # Orbax's name for the file that lists a checkpoint's arrays
_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"


class ParameterWriter:
  """Writer of a model's parameters, each slice as one or more chunks of a zarr array.

  Attributes:
    digests: The digest of every chunk written so far, by its path in the folder.
  """

  def __init__(
    self,
    directory: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    stacked: Mapping[str, bool],
  ):
    """Creates empty arrays.

    Args:
      directory: A new folder, local or gs://.
      shapes: The shape of every parameter, by "module/name".
      dtypes: The dtype of every parameter.
      stacked: Whether each parameter has a leading axis of layers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    self._directory = directory
    self._remote = is_remote(directory)
    self._paths = list(shapes)
    self._stacked = dict(stacked)
    self._rows: dict[str, int] = {}
    self._arrays: dict[str, ts.TensorStore] = {}
    self.digests: dict[str, checksums.Digest] = {}
    for path, shape in shapes.items():
      layer_shape = shape[1:] if stacked[path] else shape
      row_bytes = math.prod(layer_shape[1:]) * dtypes[path].itemsize
      rows = min(layer_shape[0], max(1, CHUNK_BYTES // row_bytes))
      self._rows[path] = rows
      chunks = (1,) * stacked[path] + (rows, *layer_shape[1:])
      self._arrays[path] = self._create(path, shape, dtypes[path], chunks)

  def _create(
    self, path: str, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]
  ) -> ts.TensorStore:
    return ts.open(
      {
        "driver": "zarr",
        "kvstore": _kvstore(self._folder(path)),
        "metadata": {
          "shape": shape,
          "chunks": chunks,
          "dtype": _zarr_dtype(dtype),
          "compressor": None,  # weights do not compress, and plain bytes need no decoding
          "order": "C",
          "fill_value": None,
          "filters": None,
          "dimension_separator": ".",
        },
        "create": True,
      }
    ).result()

  def _folder(self, path: str) -> epath.Path:
    return self._directory / ".".join(path.split("/"))

  def row_ranges(self, path: str) -> Iterator[slice]:
    """Yields the row ranges of one layer, in order, for which `write` is called."""
    shape = self._arrays[path].shape[self._stacked[path] :]
    for start in range(0, shape[0], self._rows[path]):
      yield slice(start, min(start + self._rows[path], shape[0]))

  def write(self, path: str, layer: int | None, rows: slice, values: np.ndarray) -> None:
    """Writes a range of rows of one layer.

    An uncompressed chunk consists of the values' own bytes, which are written directly: TensorStore
    would copy every value once more.

    Args:
      path: The parameter, as "module/name".
      layer: Index along the leading axis; None if the parameter is not stacked.
      rows: One of `row_ranges`.
      values: The values of these rows, C-contiguous, in the parameter's dtype.
    """
    height = self._rows[path]
    place = [layer] * (layer is not None) + [rows.start // height] + [0] * (values.ndim - 1)
    data = values.reshape(-1).view(np.uint8).data
    # All chunks of a zarr array have the same size; the last one extends beyond the array.
    padding = bytes(values[:1].nbytes * (height - len(values)))
    chunk = self._folder(path) / ".".join(map(str, place))
    with chunk.open("wb") as file:
      file.write(bytes(data) if self._remote else data)  # remote files accept only bytes
      file.write(padding)
    self.digests[f"{chunk.parent.name}/{chunk.name}"] = checksums.of((data, padding))

  def finish(self) -> None:
    """Writes the metadata that lets Orbax restore the arrays as a nested dict."""
    tree = {}
    for path in self._paths:
      keys = tuple(path.split("/"))
      tree[str(keys)] = {
        "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: key of a dict
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
      }
    metadata = {
      "tree_metadata": tree,
      "use_ocdbt": False,
      "use_zarr3": False,
      "store_array_data_equal_to_fill_value": True,
      "custom_metadata": None,
    }
    (self._directory / _METADATA).write_text(json.dumps(metadata))
    # Orbax requires this file, too, but none of its entries.
    (self._directory / _CHECKPOINT_METADATA).write_text("{}")


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """An array on disk, read in slices.

  Attributes:
    directory: The folder of the parameters.
    name: The array's name in messages.
    store: The array. Reading a missing chunk is an error.
  """

  directory: epath.Path
  name: str
  store: ts.TensorStore

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the array."""
    return self.store.shape

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the array in NumPy."""
    return self.store.dtype.numpy_dtype

  def __getitem__(self, index: Any) -> np.ndarray:
    """Reads a slice.

    Raises:
      ValueError: The files are damaged.
    """
    with _naming(self.directory, self.name):
      return self.store[index].read().result()


def open_parameters(directory: epath.Path) -> dict[str, StoredArray]:
  """Opens the arrays of a checkpoint written by Orbax or `ParameterWriter`.

  Args:
    directory: The folder with `_METADATA`.

  Returns:
    The arrays by "module/name".

  Raises:
    ValueError: The folder is not a checkpoint of parameters.
  """
  directory = epath.Path(directory)
  try:
    metadata = json.loads((directory / _METADATA).read_text())
    trees = [entry["key_metadata"] for entry in metadata["tree_metadata"].values()]
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(f"not a complete checkpoint: {directory} has no valid {_METADATA}") from error
  context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
  arrays = {}
  for entries in trees:
    keys = [str(entry["key"]) for entry in entries]
    name = ".".join(keys)
    if metadata.get("use_ocdbt"):
      kvstore: Any = {"driver": "ocdbt", "base": _kvstore(directory), "path": f"{name}/"}
    else:
      kvstore = _kvstore(directory / name)
    spec = {
      "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
      "kvstore": kvstore,
      "fill_missing_data_reads": False,
    }
    path = "/".join(keys)
    with _naming(directory, path):
      store = ts.open(spec, context=context, open=True, read=True).result()
    arrays[path] = StoredArray(directory, path, store)
  return arrays


def read_slices(array: StoredArray | jax.Array) -> Iterator[tuple[int, np.ndarray]]:
  """Reads an array along its leading axis, in blocks of whole chunks.

  Yields:
    The index of the block's first row, and the rows.
  """
  stored = isinstance(array, StoredArray)
  block = array.store.chunk_layout.read_chunk.shape[0] if stored else 1
  for start in range(0, array.shape[0], block):
    yield start, np.asarray(array[start : start + block])


@contextlib.contextmanager
def _naming(directory: epath.Path, name: str) -> Iterator[None]:
  """Turns TensorStore's errors, ValueErrors of many lines, into a sentence that names the array.

  Raises:
    ValueError: Replaces TensorStore's own error.
  """
  try:
    yield
  except ValueError as error:
    reason = str(error).partition(" [")[0]
    raise ValueError(f"damaged checkpoint {directory}: cannot read {name}: {reason}") from error


def _kvstore(path: epath.Path) -> dict[str, str] | str:
  if is_remote(path):
    return f"{path}/"
  return {"driver": "file", "path": f"{path.resolve()}/"}


def _zarr_dtype(dtype: np.dtype) -> str:
  return "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str
