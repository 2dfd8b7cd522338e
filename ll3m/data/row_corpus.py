"""Documents of rows: numbered rows in a given order, or a stream with a shuffle buffer.

Plain Python: training on such data imports neither TensorFlow nor seqio.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, override, runtime_checkable

import numpy as np

from ll3m.data.corpus import Corpus, DocumentIterator
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.examples import (
  Examples,
  OpenSource,
  Table,
  choose_shape,
  hold_out,
)
from ll3m.data.hub_rows import StreamedRows, load_dataset
from ll3m.data.packing import Document, fit
from ll3m.data.scanning import Counting, default_overflow
from ll3m.data.shape_errors import describe_lack
from ll3m.data.shuffling import NumberOrder
from ll3m.data.skipped_examples import Skipped, Unusable
from ll3m.data.text_processor import TextProcessor
from ll3m.data.tokenizer import Tokenizer

# Documents in the shuffle buffer of a streamed shard; the buffer is saved with the position.
_BUFFER = 128
# Version of the position format. Older stream positions have this format but no number.
_FORMAT = 1
# A stream without usable rows is refused after this many rows or seconds.
_MOST_TRIED, _MOST_SECONDS = 1000, 5.0


@runtime_checkable
class _Documents(Protocol):
  """Documents of one shard before the shuffle buffer; `next` raises `Unusable` for a bad row."""

  @property
  def num_passes(self) -> int: ...
  def __next__(self) -> Document: ...
  def state(self) -> dict[str, Any]: ...
  def set_state(self, state: Mapping[str, Any]) -> None: ...


class _Numbered:
  """Documents of numbered rows in a given order, whose position is that of the order."""

  def __init__(self, rows: Examples, order: NumberOrder):
    self._rows, self._order = rows, order

  @property
  def num_passes(self) -> int:
    return self._order.pass_number

  def __next__(self) -> Document:
    number = next(self._order)
    return self._rows.document(self._order.pass_number, number)

  def state(self) -> dict[str, Any]:
    return self._order.state()

  def set_state(self, state: Mapping[str, Any]) -> None:
    self._order.set_state(state)


class _Streamed:
  """Documents of streamed rows."""

  def __init__(self, rows: StreamedRows, processor: TextProcessor):
    self._rows, self._processor = rows, processor

  @property
  def num_passes(self) -> int:
    return self._rows.num_passes

  def __next__(self) -> Document:
    return self._processor(next(self._rows))

  def state(self) -> dict[str, Any]:
    return self._rows.state()

  def set_state(self, state: Mapping[str, Any]) -> None:
    self._rows.set_state(state)


class RowDocuments(DocumentIterator):
  """Iterator over the documents of one shard.

  Streams are shuffled here because the state of `datasets` excludes its own buffer.
  """

  def __init__(
    self,
    documents: _Documents,
    cut: Callable[[Document], Document],
    skipped: Skipped,
    label: str,
    *,
    buffer_seed: list[int] | None,
  ):
    self._documents, self._cut, self._skipped, self._label = documents, cut, skipped, label
    self._random = None if buffer_seed is None else np.random.default_rng(buffer_seed)
    self._capacity = 1 if buffer_seed is None else _BUFFER
    self._buffer: list[Document] = []
    self._ended = self._has_usable = False

  def __next__(self) -> Document:
    while len(self._buffer) < self._capacity and not self._ended:
      document = self._read()
      if document is None:
        self._ended = True
      elif len(document.tokens):
        self._has_usable = True
        self._buffer.append(document)
      else:
        return document  # the caller counts consecutive unusable documents
    if not self._buffer:
      raise StopIteration
    chosen = 0 if self._random is None else int(self._random.integers(len(self._buffer)))
    self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
    return self._buffer.pop()

  @property
  @override
  def is_hopeless(self) -> bool:
    return not self._has_usable and self._documents.num_passes > 0

  @override
  def state(self) -> bytes:
    return json.dumps({
      "format": _FORMAT,
      "rows": self._documents.state(),
      "has_usable": self._has_usable,
      "random": None if self._random is None else self._random.bit_generator.state,
      "buffer": [[part.tolist() for part in document] for document in self._buffer],
    }).encode()  # fmt: skip

  @override
  def set_state(self, state: bytes) -> None:
    loaded = _parse(state, self._label)
    self._documents.set_state(loaded["rows"])
    self._ended = False  # a run may have been given more epochs
    self._has_usable = loaded.get("has_usable", True)  # earlier versions required it
    if self._random is not None:
      self._random.bit_generator.state = loaded["random"]
    self._buffer = [
      Document(*(np.array(part, np.int32) for part in document)) for document in loaded["buffer"]
    ]

  def _read(self) -> Document | None:
    """Returns the next row's document (empty if the row is unusable), or None at the end."""
    try:
      document = next(self._documents, None)
      return None if document is None else self._cut(document)
    except Unusable as error:
      self._skipped.warn_and_add(self._label, str(error))
      return Document(np.zeros(0, np.int32), np.zeros(0, np.int32))


def _parse(state: bytes, label: str) -> dict[str, Any]:
  try:
    loaded = json.loads(state)
    found = f"format {loaded.get('format', 1)}"
  except ValueError:  # bytes of a tf.data iterator
    loaded, found = None, "the format of earlier versions, which read this data with TensorFlow"
  if loaded is None or loaded.get("format", 1) != _FORMAT:
    raise ValueError(
      f"the saved data position of {label} has {found}; expected format {_FORMAT}. The order of "
      "the data is unchanged, but this position cannot be converted: start a new run with "
      "`load_checkpoint` and without `load_dataset_state`; it reads the data from the beginning"
    )
  return loaded


class RowCorpus(Corpus):
  """The rows of a dataset as documents, in shards.

  Attributes:
    rows: The numbered rows; None for a stream.
    tables: All rows of the sources, including those of the other part if rows are held out.
    cut: Function that returns what is left of a document that may be longer than a row.
    overflow: What happens to documents that are longer than a row.
  """

  def __init__(
    self,
    open_documents: Callable[[int], _Documents],
    *,
    label: str,
    num_shards: int,
    rows: Examples | None,
    tables: Sequence[Table] | None,
    cut: Callable[[Document], Document],
    overflow: str,
    buffer_seed: int | None,
    skipped: Skipped,
  ):
    """Wraps a function that opens the documents of a shard; nothing is read yet.

    Args:
      open_documents: Function from the index of a shard to its documents.
      label: Name of the dataset in messages.
      num_shards: Number of shards.
      rows: The numbered rows; None for a stream.
      tables: All rows of the sources; None for a stream.
      cut: Function that returns what is left of a document that may be longer than a row.
      overflow: What `cut` does.
      buffer_seed: Seed of the shuffle buffer of documents; None for no buffer.
      skipped: Counter of unusable rows.
    """
    self._open_documents, self.cut, self._buffer_seed = open_documents, cut, buffer_seed
    self.label, self.num_shards, self.skipped = label, num_shards, skipped
    self.rows, self.tables, self.overflow = rows, tables, overflow
    self.num_examples = None if rows is None else len(rows)

  @override
  def open_shard(self, shard: int) -> RowDocuments:
    return RowDocuments(
      self._open_documents(shard),
      self.cut,
      self.skipped,
      self.label,
      buffer_seed=None if self._buffer_seed is None else [self._buffer_seed, shard],
    )


def open_corpus(
  spec: DataSpec, tokenizer: Tokenizer, tables: Sequence[Table] | None = None
) -> RowCorpus:
  """Opens a dataset of rows.

  Args:
    spec: The dataset.
    tokenizer: The run's tokenizer.
    tables: The rows of its sources, if they have been scanned before.

  Raises:
    ValueError: The dataset cannot be opened, no row is usable, or a row is unusable and
      `spec.strict` is set.
  """
  config, shuffle_seed = spec.config, spec.seed if spec.shuffle else None
  length, skipped = config.seqio_dataset.length, Skipped(strict=spec.strict)
  label = ", ".join(source.name for source in spec.sources)
  streamed = config.huggingface_dataset.streaming
  rows, num_shards = None, config.seqio_dataset.num_shards
  if streamed:
    stream, processor = _open_stream(spec, tokenizer)
    overflow = config.overflow or default_overflow([processor.shape])
  else:
    if tables is None:
      tables = scan_sources(spec, tokenizer, skipped)
    rows = number_rows(spec, tables, shuffle_seed=shuffle_seed)
    overflow = config.overflow or default_overflow(table.shape for table in rows.tables)
    num_shards = min(num_shards, len(rows))

  def open_streamed(shard: int) -> _Documents:
    from datasets.distributed import split_dataset_by_node

    def open_rows() -> Any:
      # Splits by file if the files divide evenly, else by example.
      return split_dataset_by_node(stream, rank=shard, world_size=num_shards)

    return _Streamed(StreamedRows(open_rows, passes=spec.passes), processor)

  def open_numbered(shard: int) -> _Documents:
    return _Numbered(rows, number_order(rows, shard, num_shards, shuffle_seed, spec.passes))

  return RowCorpus(
    open_streamed if streamed else open_numbered,
    label=label,
    num_shards=num_shards,
    rows=rows,
    tables=tables,
    cut=functools.partial(fit, length=length, overflow=overflow, prefix=tokenizer.prefix),
    overflow=overflow,
    buffer_seed=shuffle_seed if streamed else None,  # otherwise row numbers are shuffled
    skipped=skipped,
  )


def number_order(
  rows: Examples, shard: int, num_shards: int, shuffle_seed: int | None, passes: int | None
) -> NumberOrder:
  """Returns the order in which a shard reads its rows."""
  return NumberOrder(
    len(rows), shard=shard, num_shards=num_shards, shuffle_seed=shuffle_seed, passes=passes
  )


def scan_sources(spec: DataSpec, tokenizer: Tokenizer, skipped: Skipped) -> list[Table]:
  """Opens and scans the sources of a dataset.

  Raises:
    ValueError: A source cannot be opened or has no usable row, or a row is unusable and none may be
      skipped.
  """
  config = spec.config
  opened = [OpenSource(source, config, tokenizer) for source in spec.sources]
  counting = None
  if spec.count_tokens:
    overflow = config.overflow or default_overflow(source.shape for source in opened)
    counting = Counting(config.seqio_dataset.length, overflow, spec.workers)
  return [source.scan(skipped, counting=counting) for source in opened]


def number_rows(spec: DataSpec, tables: Sequence[Table], *, shuffle_seed: int | None) -> Examples:
  """Numbers the rows of a dataset, without those of its other part if rows are held out.

  Evaluation reads every row once, whatever the weights.
  """
  if spec.eval_fraction:
    tables = hold_out(tables, spec.eval_fraction, held_out=spec.is_evaluation)
  weights = [source.weight for source in spec.sources]
  has_weights = None not in weights and not spec.is_evaluation
  return Examples(tables, weights if has_weights else None, shuffle_seed=shuffle_seed)


def _open_stream(spec: DataSpec, tokenizer: Tokenizer) -> tuple[Any, TextProcessor]:
  """Opens a streamed dataset and recognises the shape of its rows."""
  (source,) = spec.sources
  stream = load_dataset(*source.hub, streaming=True)
  processor, tried, lack = None, Skipped(), ""
  started = time.monotonic()
  for number, row in enumerate(stream.take(_MOST_TRIED), start=1):
    if processor is None:
      shape = choose_shape(spec.config, row, f"{source.name}, row {number}")
      processor, lack = TextProcessor(shape, tokenizer), describe_lack(shape, row)
    try:
      processor(row)
    except Unusable as error:
      tried.add(f"{source.name}, row {number}", str(error))
      if time.monotonic() - started < _MOST_SECONDS:
        continue
      break
    return stream, processor
  why = f"{tried.describe() or 'it is empty'}{lack}"
  raise ValueError(f"{source.name} has no usable row so far: {why}")
