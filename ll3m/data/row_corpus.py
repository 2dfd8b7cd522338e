"""Documents of json and huggingface datasets: rows -> TextProcessor -> shuffle buffer (streams).

Plain Python: training on such data imports neither TensorFlow nor seqio.
"""

import json
from collections.abc import Callable
from typing import Any, override

import numpy as np

from ll3m.data.corpus import Corpus, DocumentIterator
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.packing import Document
from ll3m.data.rows import NumberedRows, RowFiles, Rows, StreamedRows, load_huggingface
from ll3m.data.shuffling import NumberOrder
from ll3m.data.skipped_examples import Skipped, Unusable
from ll3m.data.text_processor import TextProcessor
from ll3m.data.tokenizer import Tokenizer

# Documents in the shuffle buffer of a streamed shard; the buffer is saved with the position.
_BUFFER = 128
# Version of the position format. Older stream positions have this format but no number.
_FORMAT = 1


class RowCorpus(Corpus):
  """The rows of a dataset as documents, in shards."""

  def __init__(
    self,
    open_rows: Callable[[int], Rows],
    processor: TextProcessor,
    *,
    label: str,
    num_shards: int,
    num_examples: int | None,
    buffer_seed: int | None,
    skipped: Skipped,
  ):
    """Wraps a function that opens the rows of a shard; nothing is read yet.

    Args:
      open_rows: Function from the index of a shard to its rows.
      processor: Processor that converts rows to documents.
      label: Name of the dataset in messages.
      num_shards: Number of shards.
      num_examples: Number of rows, or None if unknown.
      buffer_seed: Seed of the shuffle buffer of documents; None for no buffer.
      skipped: Counter of unusable rows.
    """
    self._open_rows, self._processor, self._buffer_seed = open_rows, processor, buffer_seed
    self.label, self.num_shards, self.num_examples = label, num_shards, num_examples
    self.skipped = skipped

  @override
  def open_shard(self, shard: int) -> "RowDocuments":
    return RowDocuments(
      self._open_rows(shard),
      self._processor,
      self.skipped,
      self.label,
      buffer_seed=None if self._buffer_seed is None else [self._buffer_seed, shard],
    )


class RowDocuments(DocumentIterator):
  """Iterator over the documents of one shard.

  Streams are shuffled here because the state of `datasets` excludes its own buffer.
  """

  def __init__(
    self,
    rows: Rows,
    processor: TextProcessor,
    skipped: Skipped,
    label: str,
    *,
    buffer_seed: list[int] | None,
  ):
    self._rows, self._processor, self._skipped, self._label = rows, processor, skipped, label
    self._random = None if buffer_seed is None else np.random.default_rng(buffer_seed)
    self._capacity = 1 if buffer_seed is None else _BUFFER
    self._buffer: list[Document] = []
    self._ended = False

  def __next__(self) -> Document:
    while len(self._buffer) < self._capacity and not self._ended:
      document = self._read()
      if document is None:
        self._ended = True
      elif len(document.tokens):
        self._buffer.append(document)
      else:
        return document  # the caller counts consecutive unusable documents
    if not self._buffer:
      raise StopIteration
    chosen = 0 if self._random is None else int(self._random.integers(len(self._buffer)))
    self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
    return self._buffer.pop()

  @override
  def state(self) -> bytes:
    return json.dumps({
      "format": _FORMAT,
      "rows": self._rows.state(),
      "ended": self._ended,
      "random": None if self._random is None else self._random.bit_generator.state,
      "buffer": [[part.tolist() for part in document] for document in self._buffer],
    }).encode()  # fmt: skip

  @override
  def set_state(self, state: bytes) -> None:
    loaded = _parse(state, self._label)
    self._rows.set_state(loaded["rows"])
    self._ended = loaded["ended"]
    if self._random is not None:
      self._random.bit_generator.state = loaded["random"]
    self._buffer = [
      Document(*(np.array(part, np.int32) for part in document)) for document in loaded["buffer"]
    ]

  def _read(self) -> Document | None:
    """Returns the next row's document (empty if the row is unusable), or None at the end."""
    try:
      row = next(self._rows, None)
      return None if row is None else self._processor(row)
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


def open_corpus(spec: DataSpec, tokenizer: Tokenizer) -> RowCorpus:
  """Opens a json or huggingface dataset.

  Raises:
    ValueError: The dataset cannot be opened, no row is usable, or a row is unusable and
      `spec.strict` is set.
  """
  config, shuffle_seed = spec.config, spec.seed if spec.shuffle else None
  num_shards, num_examples = config.seqio_dataset.num_shards, None
  processor, skipped = TextProcessor(config.text_processor, tokenizer), Skipped(strict=spec.strict)
  is_streamed = config.type == "huggingface" and config.huggingface_dataset.streaming
  if config.type == "json":
    path = config.json_dataset.path
    rows = RowFiles(path, spec.files[path], processor, skipped)
  else:
    path = config.huggingface_dataset.path
    rows = load_huggingface(config.huggingface_dataset, spec.split)
  if not is_streamed:
    num_examples = len(rows)
    num_shards = min(num_shards, num_examples)

  def open_streamed(shard: int) -> Rows:
    from datasets.distributed import split_dataset_by_node

    return StreamedRows(
      # Splits by file if the files divide evenly, else by example.
      lambda: split_dataset_by_node(rows, rank=shard, world_size=num_shards),
      repeat=spec.repeat,
    )

  def open_numbered(shard: int) -> Rows:
    order = NumberOrder(
      num_examples,
      shard=shard,
      num_shards=num_shards,
      shuffle_seed=shuffle_seed,
      repeat=spec.repeat,
    )
    return NumberedRows(rows, order)

  return RowCorpus(
    open_streamed if is_streamed else open_numbered,
    processor,
    label=f"{config.type} dataset {path}",
    num_shards=num_shards,
    num_examples=num_examples,
    buffer_seed=shuffle_seed if is_streamed else None,  # otherwise row numbers are shuffled
    skipped=skipped,
  )
