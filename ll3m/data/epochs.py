"""The length of a stream of whole epochs, known before it is read.

The rows of batches are packed from the counts of tokens alone, in the order in which the stream
reads the documents.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from ll3m.data.config import SeqioDatasetConfig
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.packing import Document, Packer
from ll3m.data.row_corpus import RowCorpus, number_order


def count_batches(corpus: RowCorpus, spec: DataSpec, passes: range, *, next_row: int = 0) -> int:
  """Returns the number of batches that hold some passes, by packing the counts of tokens.

  Args:
    corpus: A corpus of numbered rows whose tokens were counted.
    spec: Its dataset.
    passes: Numbers of the passes, from 0.
    next_row: Number of the stream's row at which the first of these passes begins.
  """
  if not passes:
    return 0
  options, num_shards = spec.config.seqio_dataset, corpus.num_shards
  last = 0
  for shard in range(num_shards):
    num_rows = count_rows(_kept(corpus, spec, shard, passes), options, corpus.overflow)
    first = (shard - next_row) % num_shards
    last = max(last, (num_rows - 1) * num_shards + first + 1)
  return -(-last // options.batch_size)


def _kept(corpus: RowCorpus, spec: DataSpec, shard: int, passes: range) -> Iterator[int]:
  """Yields the number of tokens of a shard's documents in some passes, in order."""
  seed = spec.seed if spec.shuffle else None
  order = number_order(corpus.rows, shard, corpus.num_shards, seed, passes.stop)
  order.start_pass(passes.start)
  for number in order:
    yield corpus.rows.kept_tokens(order.pass_number, number)


def count_rows(counts: Iterable[int], options: SeqioDatasetConfig, overflow: str) -> int:
  """Returns the number of rows that documents of these numbers of tokens fill, in order."""
  packer = Packer(options.length, pack=options.pack, whole=overflow != "split")
  return sum(1 for _ in _pack(packer, counts))


def _pack(packer: Packer, counts: Iterable[int]) -> Iterator[None]:
  """Yields once for every row that a packer fills with documents of these sizes."""
  blank = np.zeros(2**16, np.int32)
  for count in counts:
    if count:
      tokens = blank[:count] if count <= len(blank) else np.zeros(count, np.int32)
      packer.add(Document(tokens, tokens))
    while packer.segments() is not None:
      yield
  while packer.segments(last=True) is not None:
    yield
