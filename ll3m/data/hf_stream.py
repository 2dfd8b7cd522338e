"""Documents of a Hugging Face dataset that is streamed, with a position that can be saved.

Python generators cannot be part of a tf.data pipeline whose position is saved, so this keeps
`datasets`' own state beside; rows, shards and batches are made as for every other dataset.
"""

import json
from collections.abc import Callable
from typing import Any, override

import numpy as np
from datasets.distributed import split_dataset_by_node

from ll3m.data.config import DatasetConfig
from ll3m.data.corpus import Corpus, DocumentIterator
from ll3m.data.hf_rows import load_huggingface
from ll3m.data.packing import Document
from ll3m.data.text_processor import TextProcessor
from ll3m.data.tokenizer import Tokenizer
from ll3m.data.unusable import Skipped, Unusable

# Documents that wait in a shard while a random one of them is taken; they are saved.
_SHUFFLE_BUFFER = 128


class StreamingCorpus(Corpus):
  """A streamed dataset in shards: by file where these divide evenly, else by example."""

  def __init__(
    self,
    rows: Any,
    processor: TextProcessor,
    *,
    label: str,
    num_shards: int,
    shuffle_seed: int | None,
    repeat: bool,
    skipped: Skipped,
  ):
    """Wraps a `datasets.IterableDataset`; nothing is read yet."""
    self._rows, self._processor = rows, processor
    self._shuffle_seed, self._repeat = shuffle_seed, repeat
    self.label, self.num_shards, self.num_examples = label, num_shards, None
    self.skipped = skipped

  @override
  def open_shard(self, shard: int) -> "StreamedDocuments":
    return StreamedDocuments(
      lambda: split_dataset_by_node(self._rows, rank=shard, world_size=self.num_shards),
      self._processor,
      lambda reason: self.skipped.warn_and_add(self.label, str(reason)),
      seed=None if self._shuffle_seed is None else [self._shuffle_seed, shard],
      repeat=self._repeat,
    )


class StreamedDocuments(DocumentIterator):
  """The documents of one shard of a stream.

  The shuffle buffer is ours: the one of `datasets` is not part of its state.
  """

  def __init__(
    self,
    open_rows: Callable[[], Any],
    processor: TextProcessor,
    skip: Callable[[Unusable], None],
    *,
    seed: list[int] | None,
    repeat: bool,
  ):
    # Opened anew for every pass: one that was moved to a position returns there at its end.
    self._open_rows, self._rows = open_rows, open_rows()
    self._processor, self._skip = processor, skip
    self._random = None if seed is None else np.random.default_rng(seed)
    self._capacity = 1 if seed is None else _SHUFFLE_BUFFER
    self._buffer: list[Document] = []
    self._repeat, self._ended = repeat, False
    self._examples = iter(self._rows)

  def __next__(self) -> Document:
    while len(self._buffer) < self._capacity and not self._ended:
      document = self._read()
      if document is None:
        self._ended = True
      elif len(document.tokens):
        self._buffer.append(document)
      else:
        return document  # the caller counts how many in a row are unusable
    if not self._buffer:
      raise StopIteration
    chosen = 0 if self._random is None else int(self._random.integers(len(self._buffer)))
    self._buffer[chosen], self._buffer[-1] = self._buffer[-1], self._buffer[chosen]
    return self._buffer.pop()

  @override
  def state(self) -> bytes:
    return json.dumps({
      "rows": self._rows.state_dict(),
      "ended": self._ended,
      "random": None if self._random is None else self._random.bit_generator.state,
      "buffer": [[part.tolist() for part in document] for document in self._buffer],
    }).encode()  # fmt: skip

  @override
  def set_state(self, state: bytes) -> None:
    loaded = json.loads(state)
    self._rows = self._open_rows()
    self._rows.load_state_dict(loaded["rows"])
    self._examples = iter(self._rows)
    self._ended = loaded["ended"]
    if self._random is not None:
      self._random.bit_generator.state = loaded["random"]
    self._buffer = [
      Document(*(np.array(part, np.int32) for part in document)) for document in loaded["buffer"]
    ]

  def _read(self) -> Document | None:
    """Returns the next example's document, empty if unusable; None at the end."""
    example = next(self._examples, None)
    if example is None and self._repeat:
      self._rows = self._open_rows()
      self._examples = iter(self._rows)
      example = next(self._examples, None)
    if example is None:
      return None
    try:
      return self._processor(example)
    except Unusable as error:
      self._skip(error)
      return Document(np.zeros(0, np.int32), np.zeros(0, np.int32))


def open_corpus(
  config: DatasetConfig,
  tokenizer: Tokenizer,
  *,
  data_dir: str | None,
  seed: int,
  split_default: str,
  repeat: bool,
  strict: bool,
) -> StreamingCorpus:
  """Opens the dataset that `config` names.

  Raises:
    ValueError: if it cannot be opened.
  """
  options = config.seqio_dataset
  shuffle = repeat if options.shuffle is None else options.shuffle
  return StreamingCorpus(
    load_huggingface(config.huggingface_dataset, split_default),
    TextProcessor(config.text_processor, tokenizer),
    label=f"huggingface dataset {config.huggingface_dataset.path}",
    num_shards=options.num_shards,
    shuffle_seed=seed if shuffle else None,
    repeat=repeat,
    skipped=Skipped(strict=strict),
  )
