"""Checksums of a checkpoint's files, which detect changes on disk before the data is used.

Storage may truncate a file or flip a bit, and arrays of plain values look valid either way. So a
checkpoint's folder holds `digests.json`, which is written before the folder counts as complete: the
size and the XXH3 checksum (https://xxhash.com) of every file. Hashing runs at memory speed and
takes a few percent of the loading time.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import xxhash
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

FILE = "digests.json"

_BLOCK_BYTES = 2**20
_THREADS = 4  # remote reads block, and hashing releases the GIL
_LISTED = 5  # maximum number of files in one message

Digest = dict[str, Any]  # {"bytes": size, "xxh3": 16 hexadecimal digits}


def of(pieces: Iterable[Any]) -> Digest:
  """Returns the digest of a file, given as consecutive buffers of bytes."""
  state, size = xxhash.xxh3_64(), 0
  for piece in pieces:
    state.update(piece)
    size += len(piece)
  return {"bytes": size, "xxh3": state.hexdigest()}


def of_file(path: epath.Path) -> Digest:
  """Returns the digest of a file, which is read block by block."""
  with path.open("rb") as file:
    return of(iter(lambda: file.read(_BLOCK_BYTES), b""))


def write(
  folder: epath.Path, known: Mapping[str, Digest] | None = None, leave_out: Collection[str] = ()
) -> None:
  """Writes the digests of a folder that is otherwise complete.

  Args:
    folder: The folder; all its files are read except those in `known`.
    known: Digests of files by their paths in the folder; the files need not exist yet.
    leave_out: Paths of temporary files, which get no digest.
  """
  known = dict(known or {})
  present = {os.path.relpath(file, folder): file for file in _files(folder)}
  to_read = {n: f for n, f in present.items() if n not in {*known, *leave_out, FILE}}
  found = known | dict(zip(to_read, _map(of_file, to_read.values()), strict=True))
  lines = (f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
  (folder / FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check(folder: epath.Path) -> None:
  """Checks that every file is unchanged since the folder was written.

  Several processes each read a share of the files and reach the same result. If every host has a
  copy of its own, each host therefore checks only its share of that copy.

  Raises:
    ValueError: Files are missing, truncated or changed; the message names them.
  """
  # Checked first, because process_count initialises the devices, which not every command needs.
  several = jax.distributed.is_initialized() and jax.process_count() > 1
  index, count = (jax.process_index(), jax.process_count()) if several else (0, 1)
  wrong = _wrong(folder, index, count)
  if several:  # whatever was found, because the other processes wait here
    everywhere = multihost_utils.process_allgather(np.int32(len(wrong)))
    if not wrong and np.sum(everywhere):
      wrong = ["process " + str(int(np.argmax(everywhere))) + " found files that changed"]
  if wrong:
    more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    raise ValueError(f"damaged checkpoint {folder}: {'; '.join(wrong[:_LISTED])}{more}")


def _wrong(folder: epath.Path, index: int, count: int) -> list[str]:
  """Returns what is wrong with every `count`-th file, starting with file `index`."""
  path = folder / FILE
  if not path.exists():
    logging.warning("%s has no %s; its files are not verified", folder, FILE)
    return []
  try:
    expected = {name: dict(digest) for name, digest in json.loads(path.read_text()).items()}
  except (OSError, ValueError, AttributeError, TypeError) as error:
    return [f"{FILE} cannot be read: {error}"]
  names = list(expected)[index::count]
  problems = _map(lambda name: _problem(folder / name, expected[name]), names)
  return [f"{name} {what}" for name, what in zip(names, problems, strict=True) if what]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for entry in folder.iterdir():  # etils cannot glob recursively
    if entry.is_dir():
      yield from _files(entry)
    else:
      yield entry


def _problem(file: epath.Path, expected: Digest) -> str | None:
  try:
    size = file.stat().length
    if size != expected.get("bytes"):
      return f"has {size} bytes, expected {expected.get('bytes')}"
    return None if of_file(file) == expected else "does not match its checksum"
  except FileNotFoundError:
    return "is missing"
  except (OSError, ValueError) as error:  # ValueError: not a valid file name
    return f"cannot be read: {error}"


def _map[T, R](function: Callable[[T], R], values: Iterable[T]) -> list[R]:
  with ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(function, values))
