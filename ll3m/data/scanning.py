"""The scan of a source's rows, which finds the usable ones and can count their tokens.

Rows are examined in chunks, in worker processes if there are many. The result does not depend on
the number of workers.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64
from tqdm import tqdm

from ll3m.data.packing import Document, fit
from ll3m.data.row_files import RowFile, to_row
from ll3m.data.shapes import Shape, is_missing, recognise
from ll3m.data.skipped_examples import Skipped, Unusable
from ll3m.data.text_processor import TextProcessor

_CHUNK = 1000  # rows
# Fewer rows than this are examined before workers would have started, which takes about a second.
_FEW = 8 * _CHUNK
# A source without usable rows is refused after this many rows or seconds.
_MOST_TRIED, _MOST_SECONDS = 1000, 5.0


@dataclasses.dataclass(frozen=True)
class Counting:
  """How tokens are counted.

  Attributes:
    length: T, tokens per row of a batch.
    overflow: What happens to longer documents; see `packing.fit`.
    workers: Number of processes; 1 for only this one.
  """

  length: int
  overflow: str
  workers: int = 1


@dataclasses.dataclass(frozen=True)
class Counts:
  """Tokens of rows.

  Attributes:
    tokens: Tokens of each document, before anything is cut off; 0 if it has none to train on.
    kept: Tokens that are left; 0 for a dropped document.
    trained: Tokens among those left that are trained.
    unknown: Tokens of each document that stand for characters that the tokenizer does not have.
    digests: Hashes of the documents; equal documents have equal hashes.
  """

  tokens: Int64[np.ndarray, "n"]
  kept: Int64[np.ndarray, "n"]
  trained: Int64[np.ndarray, "n"]
  unknown: Int64[np.ndarray, "n"]
  digests: Int64[np.ndarray, "n"]

  def select(self, numbers: Any) -> "Counts":
    """Returns the counts of some of the rows."""
    return Counts(*(column[numbers] for column in self.columns))

  @property
  def columns(self) -> tuple[np.ndarray, ...]:
    """The arrays, in the order of the fields."""
    return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  @property
  def truncated(self) -> Bool[np.ndarray, "n"]:
    """Whether each document is cut off."""
    return (self.kept < self.tokens) & (self.kept > 0)


class Scan(NamedTuple):
  """What a scan has found.

  Attributes:
    rows: File, start and end of every usable row.
    counts: Tokens of these rows, or None.
    num_skipped: Number of unusable rows.
  """

  rows: Int64[np.ndarray, "n 3"]
  counts: Counts | None
  num_skipped: int


class _Finding(NamedTuple):
  """A row's outcome: why it is unusable (None if it is usable, "" if it is blank), and counts."""

  reason: str | None
  counts: tuple[int, ...] = (0, 0, 0, 0, 0)
  other_shape: str = ""


def scan(
  label: str,
  files: Sequence[RowFile],
  processor: TextProcessor,
  skipped: Skipped,
  *,
  counting: Counting | None = None,
  first_place: str | None = None,
  lack: str = "",
) -> Scan:
  """Examines all rows of a source.

  Args:
    label: Name of the source in messages.
    files: Its files.
    processor: Processor that determines which rows are usable.
    skipped: Counter of this source's unusable rows.
    counting: How tokens are counted; None to only check the rows.
    first_place: Place of the row whose columns determined the shape; None if the shape was given.
      Rows of other shapes are then an error.
    lack: What the first row lacks, for the error of a source without a usable row.

  Raises:
    ValueError: No row is usable, or not one of the first 1,000 (or of those read in 5 s), rows have
      different shapes, or a row is unusable and none may be skipped.
  """
  found: list[tuple[int, int, int]] = []
  counts: list[tuple[int, ...]] = []
  started = time.monotonic()
  with tqdm(desc=f"reading {label}", unit=" rows", disable=None, leave=False, delay=2) as bar:
    for chunk, findings in _examine_all(files, processor, counting):
      for (number, position, line, _), finding in zip(chunk, findings, strict=True):
        place = files[number].place(line)
        if finding.other_shape and first_place is not None:
          raise ValueError(
            f"{place}: this row has the columns of {finding.other_shape}, but {first_place} has "
            f"those of {processor.shape.title}: separate them, or set `data_format` to use only one"
          )
        if finding.reason is None:
          found.append((number, *position))
          counts.append(finding.counts)
        elif finding.reason:
          skipped.add(place, finding.reason)
      bar.update(len(chunk))
      tried = skipped.counts.total()
      late = time.monotonic() - started > _MOST_SECONDS
      if not found and tried and (tried >= _MOST_TRIED or late):
        raise ValueError(f"{label} has no usable row so far: {skipped.describe()}{lack}")
  if not found:
    raise ValueError(f"{label} has no usable row: {skipped.describe() or 'it is empty'}{lack}")
  columns = np.array(counts, np.int64).T
  return Scan(
    np.array(found, np.int64).reshape(-1, 3),
    None if counting is None else Counts(*columns),
    skipped.counts.total(),
  )


# A row to examine: the file's number, start and end, the row's number in the file, and its data.
_Item = tuple[int, tuple[int, int], int, Any]


def _items(files: Sequence[RowFile]) -> Iterator[_Item]:
  for number, file in enumerate(files):
    for line, start, end, data in file.scan():
      yield number, (start, end), line, data


def _examine_all(
  files: Sequence[RowFile], processor: TextProcessor, counting: Counting | None
) -> Iterator[tuple[Sequence[_Item], list[_Finding]]]:
  """Yields chunks of rows and what was found in them, in order."""
  kinds = [file.kind for file in files]
  chunks = itertools.batched(_items(files), _CHUNK)
  head = list(itertools.islice(chunks, _FEW // _CHUNK))
  is_few = len(head) < _FEW // _CHUNK
  workers = 1 if counting is None or is_few else counting.workers
  chunks = itertools.chain(head, chunks)
  if workers == 1:
    for chunk in chunks:
      yield chunk, examine(processor, counting, _pairs(chunk, kinds))
    return
  # Workers are not forked: a process with the threads of JAX must not be forked.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=context, initializer=_start_worker, initargs=(processor, counting)
  ) as pool:
    waiting: collections.deque = collections.deque()
    for chunk in chunks:
      with _without_main():
        waiting.append((chunk, pool.submit(_examine_in_worker, _pairs(chunk, kinds))))
      if len(waiting) > 2 * workers:
        chunk, future = waiting.popleft()
        yield chunk, future.result()
    for chunk, future in waiting:
      yield chunk, future.result()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
  """Hides the main module: new workers would import it, and with a command also jax."""
  main = sys.modules["__main__"]
  sys.modules["__main__"] = types.ModuleType("__main__")
  try:
    yield
  finally:
    sys.modules["__main__"] = main


def _pairs(chunk: Sequence[_Item], kinds: Sequence[str]) -> list[tuple[str, Any]]:
  return [(kinds[number], data) for number, _, _, data in chunk]


_worker: Callable[[list[tuple[str, Any]]], list[_Finding]]


def _start_worker(processor: TextProcessor, counting: Counting | None) -> None:
  global _worker
  os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers use all cores

  def work(rows: list[tuple[str, Any]]) -> list[_Finding]:
    return examine(processor, counting, rows)

  _worker = work


def _examine_in_worker(rows: list[tuple[str, Any]]) -> list[_Finding]:
  return _worker(rows)


def examine(
  processor: TextProcessor, counting: Counting | None, rows: Sequence[tuple[str, Any]]
) -> list[_Finding]:
  """Examines rows, each the kind of its file and its data as read."""
  findings: list[_Finding] = []
  readable, places = [], []
  for kind, data in rows:
    if isinstance(data, bytes) and not data.strip():
      findings.append(_Finding(""))
      continue
    row: dict[str, Any] = {}
    try:
      row = to_row(kind, data)
      readable.append(processor.read(row))
      places.append(len(findings))
      findings.append(_Finding(None))
    except Unusable as error:
      findings.append(_Finding(str(error), other_shape=_other_shape(processor, row)))
  if counting is not None:
    documents = processor.documents(readable)
    for place, document in zip(places, documents, strict=True):
      findings[place] = _Finding(None, _count(document, processor, counting))
  return findings


def _other_shape(processor: TextProcessor, row: dict[str, Any]) -> str:
  """Returns the columns of the shape that fits a row, if the processor's shape does not, or ""."""
  present = [name for name, value in row.items() if not is_missing(value)]
  if not processor.shape.lacks(present):
    return ""
  other = recognise(present)
  return other.title if other else ""


def _count(
  document: Document | Unusable, processor: TextProcessor, counting: Counting
) -> tuple[int, ...]:
  """Returns a row's entry in each column of `Counts`."""
  if isinstance(document, Unusable):
    return 0, 0, 0, 0, 0
  unknown = processor.unknown_id
  unknown = 0 if unknown < 0 else int(np.count_nonzero(document.tokens == unknown))
  hashed = hashlib.blake2b(document.tokens.tobytes(), digest_size=8).digest()
  extra = unknown, int.from_bytes(hashed, signed=True)
  try:
    kept = fit(document, counting.length, counting.overflow, prefix=processor.prefix)
  except Unusable:
    return len(document.tokens), 0, 0, *extra
  return len(document.tokens), len(kept.tokens), int(np.count_nonzero(kept.loss[1:])), *extra


def default_overflow(shapes: Iterable[Shape]) -> str:
  """Returns what happens to long documents by default: prompts must not lose their answers."""
  return "split" if all(shape.splits for shape in shapes) else "truncate"
