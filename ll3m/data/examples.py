"""Usable rows of one or more sources under consecutive numbers.

Sources are scanned once when they are opened: the scan finds the unusable rows, so that they have
no number, and can count tokens. Only the rows' positions and counts are kept in memory.
"""

import fractions
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int64

from ll3m.data import scanning, shapes
from ll3m.data.config import DatasetConfig
from ll3m.data.hub_rows import load_dataset
from ll3m.data.packing import Document
from ll3m.data.row_files import RowFile, dataset_rows, open_rows
from ll3m.data.shape_errors import describe_lack, describe_misfit
from ll3m.data.shapes import Shape
from ll3m.data.shuffling import permute
from ll3m.data.skipped_examples import Skipped, Unusable
from ll3m.data.sources import Source
from ll3m.data.text_processor import TextProcessor
from ll3m.data.tokenizer import Tokenizer

_MOST_TRIED = 1000  # rows in which a usable one must be found


class Table:
  """The usable rows of one source.

  Attributes:
    name: Name of the source in messages.
    shape: Shape of its rows.
    counts: Tokens of the rows, or None if they were not counted.
    num_skipped: Number of unusable rows.
    is_recognised: Whether the shape was recognised, and not given.
    rendering: How rows become text, for messages, if their shape leaves it open; else "".
  """

  def __init__(
    self,
    name: str,
    files: Sequence[RowFile],
    processor: TextProcessor,
    scanned: scanning.Scan,
    *,
    is_recognised: bool,
  ):
    """Binds the positions that a scan has found to their files."""
    self.name, self.shape, self.counts = name, processor.shape, scanned.counts
    self.num_skipped, self.is_recognised = scanned.num_skipped, is_recognised
    self.rendering = processor.rendering
    self._files, self._processor, self._rows = files, processor, scanned.rows

  def __len__(self) -> int:
    return len(self._rows)

  def row(self, number: int) -> dict[str, Any]:
    """Returns a row by its number."""
    file, start, end = self._rows[number].tolist()
    return self._files[file].row(self._files[file].read(start, end))

  def text(self, number: int) -> str:
    """Returns a row as the text that is tokenised."""
    return self._processor.text(self.row(number))

  def document(self, number: int) -> Document:
    """Returns a row as a document.

    Raises:
      Unusable: The row has no token to train on.
    """
    return self._processor(self.row(number))

  def select(self, numbers: Int64[np.ndarray, "n"]) -> "Table":
    """Returns a table of some of the rows."""
    counts = None if self.counts is None else self.counts.select(numbers)
    scanned = scanning.Scan(self._rows[numbers], counts, self.num_skipped)
    return Table(self.name, self._files, self._processor, scanned, is_recognised=self.is_recognised)


class OpenSource:
  """A source whose shape is known, before its rows are scanned.

  Attributes:
    name: Its name in messages.
    shape: Shape of its rows.
  """

  def __init__(self, source: Source, config: DatasetConfig, tokenizer: Tokenizer):
    """Opens a source and recognises the shape of its rows from the first one.

    Raises:
      ValueError: The source cannot be opened, or its shape is not recognised.
    """
    if source.hub is not None:
      files = [dataset_rows(source.hub[0], "dataset", load_dataset(*source.hub))]
    else:
      files = [open_rows(file, plain_text=config.plain_text) for file in source.files]
    first = _Beginning(files)
    self.name = source.name
    self.shape = choose_shape(config, first.row, first.place or source.name)
    self._files, self._processor = first.files, TextProcessor(self.shape, tokenizer)
    self._first_place = first.place if is_recognised(config) else None
    self._lack = "" if first.row is None else describe_lack(self.shape, first.row)

  def scan(self, skipped: Skipped, *, counting: scanning.Counting | None = None) -> Table:
    """Returns the usable rows.

    Args:
      skipped: Counter of the unusable rows.
      counting: How tokens are counted; None to only check the rows.

    Raises:
      ValueError: No row is usable, rows have different shapes, or a row is unusable and none may be
        skipped.
    """
    own = skipped.fresh()
    scanned = scanning.scan(
      self.name,
      self._files,
      self._processor,
      own,
      counting=counting,
      first_place=self._first_place,
      lack=self._lack,
    )
    if scanned.num_skipped:
      logging.warning("%s: %d usable rows, %s", self.name, len(scanned.rows), own.describe())
      skipped.merge(own)
    return Table(
      self.name,
      self._files,
      self._processor,
      scanned,
      is_recognised=self._first_place is not None,
    )


class _Beginning:
  """The first row of files, which is read before the scan.

  Attributes:
    row: The row; None if there is none among the first `_MOST_TRIED` lines.
    place: Name of the row in messages; "" if there is none.
    files: The files, to be scanned from their beginning.
  """

  def __init__(self, files: Sequence[RowFile]):
    self.row, self.place = None, ""
    self.files = []
    for file in files:
      read = []
      positions = iter(file.positions)
      while self.row is None and len(read) < _MOST_TRIED:
        position = next(positions, None)
        if position is None:
          break
        read.append(position)
        number, start, end = position
        try:
          self.row, self.place = file.row(file.read(start, end)), file.place(number)
        except Unusable:
          continue
      self.files.append(file._replace(positions=_chained(read, positions)))


def _chained(read: Sequence[tuple[int, int, int]], rest: Any) -> Any:
  yield from read
  yield from rest


def is_recognised(config: DatasetConfig) -> bool:
  """Returns whether the shape of rows is recognised from their columns, and not given."""
  given = (config.text_processor.fields, config.completion, config.prompt_template)
  return config.data_format == "auto" and not any(given)


def choose_shape(config: DatasetConfig, row: Mapping[str, Any] | None, place: str) -> Shape:
  """Returns the shape that the options name, or else the one that fits a row.

  Args:
    config: Options of the dataset.
    row: First row of the data; None if it has none.
    place: Name of the row in messages.

  Raises:
    ValueError: An option is malformed, or no shape fits.
  """
  if config.text_processor.fields:
    return shapes.fields_shape(config.text_processor)
  if config.completion is not None or config.prompt_template is not None:
    return shapes.template_shape(config.prompt_template, config.completion)
  if config.data_format != "auto":
    return shapes.SHAPES[config.data_format]
  if row is None:
    return shapes.SHAPES["text"]  # the scan reports why no row can be used
  present = [name for name, value in row.items() if not shapes.is_missing(value)]
  shape = shapes.recognise(present) or shapes.recognise(list(row))
  if shape is None:
    raise ValueError(f"{place}: {describe_misfit(row)}")
  if shape.name == "chosen":
    raise ValueError(
      f"{place}: its columns are those of preference pairs ({shape.title}): `data_format`=chosen "
      "trains on the chosen answers"
    )
  return shape


class Examples:
  """The rows of tables under consecutive numbers.

  Without weights, the tables follow each other. With weights, N numbers are divided among the
  tables in proportion to the weights and evenly interleaved, where N is the number of all rows; in
  each pass, every table continues where it was at the end of the pass before.
  """

  def __init__(
    self, tables: Sequence[Table], weights: Sequence[float] | None, *, shuffle_seed: int | None
  ):
    """Numbers the rows.

    Args:
      tables: Tables of at least one row each.
      weights: Weight of each table, or None.
      shuffle_seed: Seed of the order in which a weighted table is read; None for its own order.
        Without weights, the order of the numbers is all that is shuffled.
    """
    self.tables, self._seed = tuple(tables), shuffle_seed
    sizes = [len(table) for table in tables]
    self._shares = sizes if weights is None else divide(sum(sizes), weights)
    self._cycles = weights is not None
    # A pass of shuffled numbers reads a few cycles of a table at the same time.
    self._permuted = functools.lru_cache(maxsize=4 * len(self.tables))(self._permute)
    places = [
      (np.arange(share) + 0.5) / share if self._cycles else np.full(share, index, float)
      for index, share in enumerate(self._shares)
    ]
    owners = np.repeat(np.arange(len(sizes), dtype=np.int64), self._shares)
    ranks = np.concatenate([np.arange(share) for share in self._shares])
    order = np.argsort(np.concatenate(places), kind="stable")
    self._owners, self._ranks = owners[order], ranks[order]

  def __len__(self) -> int:
    return len(self._owners)

  def locate(self, pass_number: int, number: int) -> tuple[int, int]:
    """Returns the table and the row of a number in a pass."""
    owner, rank = int(self._owners[number]), int(self._ranks[number])
    if not self._cycles:
      return owner, rank
    size = len(self.tables[owner])
    cycle, row = divmod(pass_number * self._shares[owner] + rank, size)
    if self._seed is not None:
      row = int(self._permuted(owner, cycle)[row])
    return owner, row

  def _permute(self, owner: int, cycle: int) -> np.ndarray:
    """Returns the order in which a weighted table is read for the `cycle`-th time."""
    size = len(self.tables[owner])
    return permute(range(size), seed=self._seed + 1009 * (owner + 1) + cycle, last=size - 1)

  def of_pass(self, pass_number: int) -> list[Int64[np.ndarray, "n"]]:
    """Returns the rows of each table that a pass reads."""
    if not self._cycles:
      return [np.arange(len(table), dtype=np.int64) for table in self.tables]
    found: list[list[int]] = [[] for _ in self.tables]
    for number in range(len(self)):
      owner, row = self.locate(pass_number, number)
      found[owner].append(row)
    return [np.array(rows, np.int64) for rows in found]

  def document(self, pass_number: int, number: int) -> Document:
    """Returns the document of a number in a pass.

    Raises:
      Unusable: The row has no token to train on.
    """
    owner, row = self.locate(pass_number, number)
    return self.tables[owner].document(row)

  def kept_tokens(self, pass_number: int, number: int) -> int:
    """Returns the number of tokens of a number's document; the tables must have counts."""
    owner, row = self.locate(pass_number, number)
    return int(self.tables[owner].counts.kept[row])


def divide(total: int, weights: Sequence[float]) -> list[int]:
  """Divides a total in proportion to weights by largest remainders, with at least 1 for each."""
  exact = [total * weight / sum(weights) for weight in weights]
  shares = [max(1, int(share)) for share in exact]
  by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
  for i in by_remainder[: max(0, total - sum(shares))]:
    shares[i] += 1
  return shares


def hold_out(tables: Sequence[Table], fraction: float, *, held_out: bool) -> list[Table]:
  """Returns the rows that are held out for evaluation, or the others.

  Exactly floor(n * fraction) of the first n rows of a table are held out, evenly spread. If that is
  none at all, the last row is.

  Args:
    tables: Tables to divide.
    fraction: Fraction of the rows to hold out.
    held_out: Whether to return the held-out rows.

  Raises:
    ValueError: Nothing would be left to train on.
  """
  share = fractions.Fraction(repr(fraction))  # 0.4 is two fifths, not a float
  up, down = share.numerator, share.denominator
  masks = []
  for table in tables:
    numbers = np.arange(len(table), dtype=np.int64)
    masks.append((numbers + 1) * up // down > numbers * up // down)
  if not any(mask.any() for mask in masks):
    masks[-1][-1] = True
  if all(mask.all() for mask in masks):
    raise ValueError(
      f"`eval_fraction`={fraction} leaves no row to train on, of {sum(map(len, tables))}"
    )
  chosen = [np.flatnonzero(mask == held_out) for mask in masks]
  return [t.select(n) for t, n in zip(tables, chosen, strict=True) if len(n)]
