"""Tables of block sizes, which replace the kernels' own rule for the calls that they list.

The environment variable LL3M_KERNELS_TABLES names tables, separated as in PATH. Without it, and for
calls that no table lists, kernels follow their rule. `benchmarks/tune.py` writes tables.

A table is JSON: a list of entries, each with the fields of `Key`, `limits` by name, and `cycles`
with these limits and with the rule's.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "LL3M_KERNELS_TABLES"
# Lengths are told apart by the power of two that is not below them, within these.
_SHORTEST, _LONGEST = 1024, 4096


class Key(NamedTuple):
  """What calls are told apart by.

  Attributes:
    operation: such as "flash_attention".
    generation: of the TPU.
    dtype: of the arrays.
    size: head dim, or features of a norm.
    mask: "full", "causal" or "window"; "" of what has none.
    length: see `length_bucket`; tokens or rows.
  """

  operation: str
  generation: str
  dtype: str
  size: int
  mask: str
  length: int


def length_bucket(length: int) -> int:
  """Returns the length that stands for others: a power of two from 1024 to 4096."""
  return min(max(1 << (length - 1).bit_length(), _SHORTEST), _LONGEST)


def find(key: Key) -> dict[str, int] | None:
  """Returns the limits that a table has for a call, by name; None if there are none.

  Raises:
    ValueError: a table that the environment names cannot be read.
  """
  if _forced:
    return _forced[-1].get(key.operation)
  return _entries(os.environ.get(VARIABLE, "")).get(key)


_forced: list[Mapping[str, dict[str, int]]] = []


@contextlib.contextmanager
def force(limits: Mapping[str, dict[str, int]]) -> Iterator[None]:
  """Takes these limits, by operation, and no table, while it is open: to estimate them.

  What is compiled meanwhile must not be used outside: compiled functions are not told apart by it.
  """
  _forced.append(limits)
  try:
    yield
  finally:
    _forced.pop()


def read(path: Path) -> dict[Key, dict[str, Any]]:
  """Reads a table.

  Returns:
    Its entries, `limits` and `cycles`, by key.

  Raises:
    ValueError: it cannot be read, or is not a table.
  """
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
      Key(**{name: entry[name] for name in Key._fields}): {
        "limits": {str(name): int(value) for name, value in entry["limits"].items()},
        "cycles": entry["cycles"],
      }
      for entry in entries
    }
  except OSError as error:
    raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f"{path}: is not a table of block sizes: {error!r}") from error


def write(path: Path, entries: Mapping[Key, Mapping[str, Any]]) -> None:
  """Writes a table, whole or not at all."""
  lines = ",\n".join(
    "  " + json.dumps(key._asdict() | dict(entry)) for key, entry in sorted(entries.items())
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(".tmp")
  unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
  unfinished.replace(path)


@functools.cache
def _entries(paths: str) -> dict[Key, dict[str, int]]:
  """Merges tables; the first one that has an entry decides."""
  found: dict[Key, dict[str, int]] = {}
  for path in filter(None, paths.split(os.pathsep)):
    for key, entry in read(Path(path)).items():
      found.setdefault(key, entry["limits"])
  return found
