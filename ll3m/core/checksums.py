"""Checksums of the files of a checkpoint: what changed on disk is found before it is believed.

Storage may lose the end of a file or flip a bit, and arrays of plain values look well either way.
So a checkpoint's folder holds `digests.json`, written before the folder counts as complete: the
size and the XXH3 checksum (https://xxhash.com) of every file in it. Hashing runs at the speed of
memory: a few percent of the time that loading takes.
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
_THREADS = 4  # reading from afar waits, and hashing lets go of the interpreter
_LISTED = 5  # files in one message

Digest = dict[str, Any]  # {"bytes": size, "xxh3": 16 hexadecimal digits}


def of(pieces: Iterable[Any]) -> Digest:
  """Returns the digest of a file that consists of these pieces, each a buffer of bytes."""
  state, size = xxhash.xxh3_64(), 0
  for piece in pieces:
    state.update(piece)
    size += len(piece)
  return {"bytes": size, "xxh3": state.hexdigest()}


def of_file(path: epath.Path) -> Digest:
  """Returns the digest of a file, with one block of it in memory."""
  with path.open("rb") as file:
    return of(iter(lambda: file.read(_BLOCK_BYTES), b""))


def write(
  folder: epath.Path, known: Mapping[str, Digest] | None = None, leave_out: Collection[str] = ()
) -> None:
  """Writes the digests of a folder that is otherwise complete.

  Args:
    folder: all its files are read, but for those that are known.
    known: digests of files by their path in the folder; they need not be there yet.
    leave_out: files that will not stay.
  """
  known = dict(known or {})
  present = {os.path.relpath(file, folder): file for file in _files(folder)}
  to_read = {n: f for n, f in present.items() if n not in {*known, *leave_out, FILE}}
  found = known | dict(zip(to_read, _map(of_file, to_read.values()), strict=True))
  lines = (f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
  (folder / FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check(folder: epath.Path) -> None:
  """Demands that every file is what it was when the folder was written.

  Of several processes, each reads its share of the files, and all come to the same end. Of copies
  that the hosts have for themselves, each host therefore checks only its share.

  Raises:
    ValueError: files are missing, cut or changed; it names them.
  """
  # Asked first: to count the processes starts jax's devices, which not every command needs.
  several = jax.distributed.is_initialized() and jax.process_count() > 1
  index, count = (jax.process_index(), jax.process_count()) if several else (0, 1)
  wrong = _wrong(folder, index, count)
  if several:  # whatever was found: who is missing here is waited for
    everywhere = multihost_utils.process_allgather(np.int32(len(wrong)))
    if not wrong and np.sum(everywhere):
      wrong = ["process " + str(int(np.argmax(everywhere))) + " found files that changed"]
  if wrong:
    more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    raise ValueError(f"damaged checkpoint {folder}: {'; '.join(wrong[:_LISTED])}{more}")


def _wrong(folder: epath.Path, index: int, count: int) -> list[str]:
  """Says what is wrong with every count-th file, from the index-th on."""
  path = folder / FILE
  if not path.exists():
    logging.warning("%s has no %s: it is taken as it is", folder, FILE)
    return []
  try:
    expected = {name: dict(digest) for name, digest in json.loads(path.read_text()).items()}
  except (OSError, ValueError, AttributeError, TypeError) as error:
    return [f"{FILE} cannot be read: {error}"]
  names = list(expected)[index::count]
  problems = _map(lambda name: _problem(folder / name, expected[name]), names)
  return [f"{name} {what}" for name, what in zip(names, problems, strict=True) if what]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for entry in folder.iterdir():  # etils globs no deeper than this
    if entry.is_dir():
      yield from _files(entry)
    else:
      yield entry


def _problem(file: epath.Path, expected: Digest) -> str | None:
  try:
    size = file.stat().length
    if size != expected.get("bytes"):
      return f"has {size} bytes, it was saved with {expected.get('bytes')}"
    return None if of_file(file) == expected else "has another checksum than when it was saved"
  except FileNotFoundError:
    return "is missing"
  except (OSError, ValueError) as error:  # ValueError: no name of a file
    return f"cannot be read: {error}"


def _map[T, R](function: Callable[[T], R], values: Iterable[T]) -> list[R]:
  with ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(function, values))
