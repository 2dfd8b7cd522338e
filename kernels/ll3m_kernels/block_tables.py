"""Tables of tuned block sizes, which override the kernels' rule for the calls that they list.

The environment variable LL3M_KERNELS_TABLES lists the paths of tables, separated as in PATH.
Without it, and for calls that no table lists, kernels use their rule. `benchmarks/tune.py` writes
tables.

A table is a JSON list of entries. Each entry has the fields of `Key`, the `limits` by name, and the
`cycles` with these limits and with the rule's.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "LL3M_KERNELS_TABLES"
# Range of the powers of two that `length_bucket` returns.
_SHORTEST, _LONGEST = 1024, 4096


class Key(NamedTuple):
  """The properties of a call that select its entry in a table.

  Attributes:
    operation: Name of the tuned operation, such as "flash_attention".
    generation: TPU generation, such as "v5e".
    dtype: Dtype of the arrays.
    size: Head dim, or features of a norm.
    mask: "full", "causal" or "window"; "" for operations without a mask.
    length: Number of tokens or rows, rounded by `length_bucket`.
  """

  operation: str
  generation: str
  dtype: str
  size: int
  mask: str
  length: int


def length_bucket(length: int) -> int:
  """Rounds a length up to a power of two, clamped to 1024..4096."""
  return min(max(1 << (length - 1).bit_length(), _SHORTEST), _LONGEST)


def find[Limits: tuple](key: Key, limits: type[Limits]) -> Limits | None:
  """Returns the limits for a call; None if no table lists the call.

  Args:
    key: The call.
    limits: Named tuple of the operation's limits.

  Raises:
    ValueError: A table listed in the environment variable cannot be read, or has other limits.
  """
  if _forced:
    found = _forced[-1].get(key.operation)
  else:
    found = _entries(os.environ.get(VARIABLE, "")).get(key)
  if found is None:
    return None
  if found.keys() != set(limits._fields):
    raise ValueError(
      f"{VARIABLE}: a table has the limits {', '.join(found)} for {key.operation}, expected "
      f"{', '.join(limits._fields)}; tune the shape again"
    )
  return limits(**found)


_forced: list[Mapping[str, dict[str, int]]] = []


@contextlib.contextmanager
def force(limits: Mapping[str, dict[str, int]]) -> Iterator[None]:
  """Uses `limits`, by operation, instead of the tables inside the context, to estimate their cost.

  Functions compiled inside must not be used outside: jax's caches do not depend on the limits.
  """
  _forced.append(limits)
  try:
    yield
  finally:
    _forced.pop()


def read(path: Path) -> dict[Key, dict[str, Any]]:
  """Reads a table.

  Returns:
    The `limits` and `cycles` of each entry, by key.

  Raises:
    ValueError: The file cannot be read, or is not a table.
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
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f"{path} is not a table of block sizes: {error!r}") from error


def write(path: Path, entries: Mapping[Key, Mapping[str, Any]]) -> None:
  """Writes a table atomically."""
  lines = ",\n".join(
    "  " + json.dumps(key._asdict() | dict(entry)) for key, entry in sorted(entries.items())
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(".tmp")
  unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
  unfinished.replace(path)


@functools.cache
def _entries(paths: str) -> dict[Key, dict[str, int]]:
  """Merges tables; the first table that lists a key takes precedence."""
  found: dict[Key, dict[str, int]] = {}
  for path in filter(None, paths.split(os.pathsep)):
    for key, entry in read(Path(path)).items():
      found.setdefault(key, entry["limits"])
  return found
