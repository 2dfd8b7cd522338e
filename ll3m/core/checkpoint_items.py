"""The items of an Orbax checkpoint: trees of arrays, and dicts of bytes."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

Params = dict[str, dict[str, Any]]

_LISTED = 5  # maximum number of differences in one message


def describe_arrays(path: epath.Path) -> dict[str, Any]:
  """Returns a nested dict that describes an item's arrays by `shape` and `dtype`.

  Raises:
    ValueError: The item cannot be read.
  """
  with reading(path):
    return ocp.PyTreeCheckpointHandler().metadata(path).tree


def restore_arrays(path: epath.Path, like: Any) -> Any:
  """Reads an item's arrays; each device receives only its own shards.

  Args:
    path: The item's folder.
    like: The nested dict of `jax.ShapeDtypeStruct`s with shardings. Arrays are cast to its dtypes.

  Raises:
    ValueError: The arrays cannot be read.
  """
  arguments = jax.tree.map(
    lambda x: ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=x.sharding, global_shape=x.shape), like
  )
  with reading(path):
    return ocp.PyTreeCheckpointHandler().restore(
      path, args=ocp.args.PyTreeRestore(restore_args=arguments)
    )


def describe_differences(path: epath.Path, like: Any) -> str:
  """Describes how the names, shapes and dtypes of an item's arrays differ from a run's.

  Args:
    path: The item's folder.
    like: The nested dict of the run's arrays, or of their descriptions.

  Returns:
    The first differences; "" if there are none.

  Raises:
    ValueError: The item cannot be read.
  """

  def named(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): (
        f"{jnp.dtype(x.dtype).name}{list(x.shape)}"
      )
      for path, x in leaves
    }

  saved, wanted = named(describe_arrays(path)), named(like)
  lines = [f"{n} is not in the run" for n in sorted(saved.keys() - wanted.keys())]
  lines += [f"{n} was not saved" for n in sorted(wanted.keys() - saved.keys())]
  lines += [
    f"{n} is {saved[n]}, expected {wanted[n]}"
    for n in sorted(saved.keys() & wanted.keys())
    if saved[n] != wanted[n]
  ]
  return "; ".join(lines[:_LISTED]) + ("; ..." if len(lines) > _LISTED else "")


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
  """Turns errors that Orbax raises while it reads a folder into one short sentence.

  Raises:
    ValueError: Replaces any error of Orbax, including bare `Exception`s of a hundred lines.
  """
  try:
    yield
  except Exception as error:
    # The reason is in the cause: Orbax's own message quotes TensorStore's whole specification. The
    # cause ends, in brackets, with that specification and locations in TensorStore's source.
    reason = str(error.__cause__ or error).strip().replace(f"{path}/", "")
    reason = re.split(r"\n| \[(?=tensorstore_spec|source)", reason)[0]
    raise ValueError(f"cannot read {path}: {reason or type(error).__name__}") from error


def nest(params: Params) -> dict[str, Any]:
  """Splits Haiku's module names at the slashes, into the nested dict that Orbax stores."""
  tree: dict[str, Any] = {}
  for module, arrays in params.items():
    node = tree
    for part in module.split("/"):
      node = node.setdefault(part, {})
    node.update(arrays)
  return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Params:
  """Joins nested names into Haiku's two levels; the inverse of `nest`."""
  params: Params = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      params |= flatten(value, f"{prefix}/{name}" if prefix else name)
    else:
      params.setdefault(prefix, {})[name] = value
  return params


_SUFFIX = ".state"


class BytesHandler(ocp.CheckpointHandler):
  """Handler for a dict of byte strings, one file per entry: the position in the data."""

  def save(self, directory: epath.Path, args: "BytesSave") -> None:
    """Writes every entry."""
    for name, value in args.items.items():
      (directory / f"{name}{_SUFFIX}").write_bytes(value)

  def restore(self, directory: epath.Path, args: "BytesRestore") -> dict[str, bytes]:
    """Reads every entry."""
    del args
    files = directory.glob(f"*{_SUFFIX}")  # Orbax adds a file of its own
    return {file.name.removesuffix(_SUFFIX): file.read_bytes() for file in files}


@ocp.args.register_with_handler(BytesHandler, for_save=True)
@dataclasses.dataclass
class BytesSave(ocp.args.CheckpointArgs):
  """The arguments for saving with `BytesHandler`."""

  items: Mapping[str, bytes]


@ocp.args.register_with_handler(BytesHandler, for_restore=True)
@dataclasses.dataclass
class BytesRestore(ocp.args.CheckpointArgs):
  """The arguments for restoring with `BytesHandler`."""
