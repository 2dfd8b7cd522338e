"""Rows as dicts: fetched by number or streamed, with a position that can be saved."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, override

import numpy as np
from absl import logging

from ll3m.data.config import HuggingFaceDatasetConfig
from ll3m.data.row_files import as_row, open_rows
from ll3m.data.shuffling import NumberOrder
from ll3m.data.skipped_examples import Skipped, Unusable
from ll3m.data.text_processor import TextProcessor


class Rows(abc.ABC):
  """Iterator over the rows of one shard."""

  @abc.abstractmethod
  def __next__(self) -> dict[str, Any]:
    """Returns the next row.

    Raises:
      StopIteration: The rows do not repeat and have ended.
      Unusable: The data is not a row.
    """

  @abc.abstractmethod
  def state(self) -> dict[str, Any]:
    """Returns the position in a form that JSON can represent."""

  @abc.abstractmethod
  def set_state(self, state: Mapping[str, Any]) -> None:
    """Moves to a position that `state()` returned."""


class NumberedRows(Rows):
  """Rows that are fetched by number in a given order."""

  def __init__(self, rows: Any, order: NumberOrder):
    """Binds rows, a `RowFiles` or a `datasets.Dataset`, to the order of their numbers."""
    self._rows, self._order = rows, order

  def __next__(self) -> dict[str, Any]:
    return self._rows[next(self._order)]

  @override
  def state(self) -> dict[str, Any]:
    return self._order.state()

  @override
  def set_state(self, state: Mapping[str, Any]) -> None:
    self._order.set_state(state)


class StreamedRows(Rows):
  """Rows of a `datasets.IterableDataset`, whose own state is the position."""

  def __init__(self, open_rows: Callable[[], Any], *, repeat: bool):
    # Reopened for every pass: a dataset moved to a position starts from that position again.
    self._open_rows, self._repeat = open_rows, repeat
    self._start(open_rows())

  def __next__(self) -> dict[str, Any]:
    row = next(self._iterator, None)
    if row is None and self._repeat:
      self._start(self._open_rows())
      row = next(self._iterator, None)
    if row is None:
      raise StopIteration
    return row

  @override
  def state(self) -> dict[str, Any]:
    return self._rows.state_dict()

  @override
  def set_state(self, state: Mapping[str, Any]) -> None:
    rows = self._open_rows()
    rows.load_state_dict(state)
    self._start(rows)

  def _start(self, rows: Any) -> None:
    self._rows, self._iterator = rows, iter(rows)


class RowFiles(Sequence[dict[str, Any]]):
  """Usable rows of files, by number; only the rows' positions are kept in memory."""

  def __init__(self, path: str, files: Sequence[str], processor: TextProcessor, skipped: Skipped):
    """Scans the files once.

    Args:
      path: Path or glob given by the user, for messages.
      files: Names of the files; each may be of any kind that `row_files` reads.
      processor: Processor that determines which examples are usable.
      skipped: Counter of the unusable examples.

    Raises:
      ValueError: No row is usable, or a row is unusable and none may be skipped.
    """
    self._readers, found = [], []
    for number, file in enumerate(files):
      rows = open_rows(file)
      read = rows.read
      self._readers.append(read)
      for line, start, end in rows.positions:
        reason = _problem(read(start, end), processor)
        if reason is None:
          found.append((number, start, end))
        elif reason:
          skipped.add(rows.place(line), reason)
    self._rows = np.array(found, np.int64).reshape(-1, 3)
    if not found:
      raise ValueError(f"{path} has no usable line: {skipped.describe() or 'it is empty'}")
    if skipped.counts:
      logging.warning("%s: %d usable lines, %s", path, len(found), skipped.describe())
      skipped.mark_reported()

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    number, start, end = self._rows[index].tolist()
    return as_row(self._readers[number](start, end))


def _problem(data: bytes | dict[str, Any], processor: TextProcessor) -> str | None:
  """Returns why a row is unusable, "" for a blank line, None for a usable row."""
  if isinstance(data, bytes) and not data.strip():
    return ""
  try:
    processor.check(as_row(data))
  except Unusable as error:
    return str(error)
  return None


def load_huggingface(options: HuggingFaceDatasetConfig, split: str) -> Any:
  """Opens a dataset, downloading it first unless it is streamed.

  Args:
    options: Options of the dataset.
    split: Name of the split.

  Returns:
    A `datasets.Dataset`, or a `datasets.IterableDataset` if it is streamed.

  Raises:
    ValueError: The dataset cannot be opened or is empty.
  """
  import datasets

  try:
    rows = datasets.load_dataset(
      options.path, options.name, split=split, streaming=options.streaming
    )
  except Exception as error:  # `datasets` uses many libraries, with exceptions of their own
    raise ValueError(
      f"huggingface dataset {options.path!r} (name {options.name!r}, split {split!r}) "
      f"cannot be loaded: {error}"
    ) from error
  if not options.streaming and not len(rows):
    raise ValueError(f"{options.path} has no examples")
  return rows
