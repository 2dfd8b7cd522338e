"""Batches of packed rows whose order is the same for any number of processes.

A stream is split into S = num_shards shards, each with its own pipeline and packer. Row R of the
stream, counted over all batches, is row R // S of shard R mod S. Batch b of B sequences holds the
rows b * B ... b * B + B - 1. A process reads the shards that its rows come from and skips the rows
of other processes in them. Positions are saved per shard, so any number of processes can restore
them.
"""

import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from ll3m.core import stderr
from ll3m.core.options import to_dict
from ll3m.data import epochs, row_corpus
from ll3m.data.batch import Batch
from ll3m.data.config import SeqioDatasetConfig
from ll3m.data.corpus import Corpus
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.examples import Table
from ll3m.data.packing import Packer, make_row
from ll3m.data.pipeline import Pipeline
from ll3m.data.tokenizer import Tokenizer

# Options that may change when a saved position is restored: how documents are cut into rows and
# batches, and where the files are. All other options determine which document comes next.
_MAY_CHANGE = {
  *(f"seqio_dataset.{name}" for name in ("batch_size", "task_feature_lengths", "pack", "module")),
  "json_dataset.path",
  "data",
  "overflow",
}

# Options that positions of earlier versions do not have, with their defaults, which are not saved.
_NONE = object()
_ADDED = {
  "data_format": "auto",
  "prompt_template": None,
  "completion": None,
  "plain_text": "file",
}


class BatchIterator:
  """Iterator over this process's rows of every batch.

  In a stream that ends, rows past the end of a shard are padding (segment ids and mask 0), and
  iteration stops when all shards that this process reads are exhausted. Other processes may stop
  a batch earlier or later; a process that must stay in step with them continues with `padding()`.

  Attributes:
    corpus: The source of the documents.
    skipped: Unusable examples so far.
    num_shards: S, the number of shards.
    num_batches: Number of batches of all processes in a stream that ends, if tokens were counted;
      else None.
  """

  def __init__(
    self,
    corpus: Corpus,
    options: SeqioDatasetConfig,
    *,
    rows: Sequence[int],
    endless: bool,
    definition: Mapping[str, Any],
    passes: int | None = None,
    count: Callable[..., int] | None = None,
  ):
    """Starts at the beginning of the stream; pipelines are built on first use.

    Args:
      corpus: The source of the documents.
      options: Division into rows and batches.
      rows: Rows of every batch that this process reads.
      endless: Whether the stream has no end.
      definition: Everything that a saved position must agree with.
      passes: Number of passes, if their batches can be counted.
      count: Function from a range of passes, and the row at which it begins, to its number of
        batches.
    """
    if not rows or not all(0 <= r < options.batch_size for r in rows):
      raise ValueError(
        f"rows must be one or more indices into a batch of {options.batch_size}, got {list(rows)}"
      )
    self.corpus, self._options = corpus, options
    self._rows, self._endless, self._definition = tuple(rows), endless, dict(definition)
    self._passes, self._count = passes, count
    self.num_batches = None if passes is None else count(range(passes))
    self._end_row = options.batch_size * (self.num_batches or 0)
    self.num_shards, self.skipped = corpus.num_shards, corpus.skipped
    self._next_row = 0
    self._shards: dict[int, Pipeline] = {}
    self._is_first = True

  def __iter__(self) -> "BatchIterator":
    return self

  def __next__(self) -> Batch:
    """Reads the next batch.

    Raises:
      StopIteration: The stream has ended.
      ValueError: The stream is endless, but has nothing to read.
    """
    if self.num_batches is not None and self._next_row >= self._end_row:
      raise StopIteration
    mine, found = {}, False
    own = self._own_shards()
    for r in range(self._options.batch_size):
      index = (self._next_row + r) % self.num_shards
      if index in own:
        row = self._shard(index).next_row()
        found = found or row is not None
        if r in self._rows:
          mine[r] = row or make_row([], self._options.length)
    if not found and all(self._shard(index).exhausted for index in own):
      if self._endless:
        raise ValueError(
          f"{self.corpus.label} has no usable example: {self.corpus.skipped.describe()}"
        )
      # If the end is known, other processes may have rows until then.
      if self.num_batches is None:
        raise StopIteration
    if self._is_first:
      self._is_first = False
      self._warn_if_untrained()
    self._next_row += self._options.batch_size
    return Batch(*(np.stack(field) for field in zip(*(mine[r] for r in self._rows), strict=True)))

  def padding(self) -> Batch:
    """Returns a batch of padding."""
    row = make_row([], self._options.length)
    return Batch(*(np.stack([field] * len(self._rows)) for field in row))

  def state(self) -> dict[str, bytes]:
    """Returns the position after the last returned batch, one entry per shard of this process.

    The entries of all processes together are the position of the whole stream. To restore it, a
    process needs the entries of the shards that it reads, however many processes saved them.
    """
    header = json.dumps({
      "next_row": self._next_row,
      "stream": self._definition,
      "passes": self._passes,
      "end_row": self._end_row,
    })  # fmt: skip
    states = {}
    for index in sorted(self._own_shards()):
      buffer = io.BytesIO()
      np.savez(buffer, header=np.array(header), **self._shard(index).state())
      states[_entry(index)] = buffer.getvalue()
    return states

  def set_state(self, states: Mapping[str, bytes]) -> None:
    """Moves to a position that `state()` returned.

    Args:
      states: Entries of at least the shards that this process reads.

    Raises:
      ValueError: Entries are missing or damaged, disagree or belong to another stream.
    """
    if not states:
      raise ValueError("the saved data position is empty")
    loaded = {}
    for name, data in states.items():
      try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
          loaded[name] = {key: arrays[key] for key in arrays.files}
      except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"the saved data position is damaged: {name}: {error}") from error
    headers = [json.loads(str(arrays.pop("header"))) for arrays in loaded.values()]
    self._check_stream(headers[0]["stream"])
    if any(header != headers[0] for header in headers):
      raise ValueError("the saved data position mixes entries of different steps")
    self._next_row, self._shards = headers[0]["next_row"], {}
    self._move_end(headers[0])
    for index in sorted(self._own_shards()):
      if _entry(index) not in loaded:
        raise ValueError(
          f"the saved data position lacks {_entry(index)} of {self.num_shards}, found "
          f"{', '.join(sorted(loaded))}"
        )
      self._shard(index).set_state(loaded[_entry(index)])

  def _move_end(self, saved: Mapping[str, Any]) -> None:
    """Sets the end of a stream of passes whose position was saved with another end.

    The rows at an end are padded. A stream that is given more passes after its end therefore has
    more rows than one that had them from the beginning.
    """
    before, end, size = saved.get("passes"), saved.get("end_row"), self._options.batch_size
    if self._passes is None or before is None:
      return
    if before != self._passes and self._next_row >= end:
      end = self._next_row + size * self._count(
        range(before, self._passes), next_row=self._next_row
      )
    elif before != self._passes:
      end += size * (self._count(range(self._passes)) - self._count(range(before)))
    self.num_batches, self._end_row = -(-end // size), end

  def _warn_if_untrained(self) -> None:
    """Warns if none of the documents read so far has a trained token.

    Documents are checked, not rows: a row inside a long prompt has no target either.
    """
    read = sum(shard.num_read for shard in self._shards.values())
    if read and not any(shard.has_target for shard in self._shards.values()):
      logging.warning(
        "%s: none of the first %d documents has a token to train on: their loss masks are all 0 "
        "(print them with `show_batches`), so training has no effect",
        self.corpus.label,
        read,
      )

  def _own_shards(self) -> set[int]:
    """Returns the shards that this process's rows come from, in this batch or a later one."""
    step = math.gcd(self._options.batch_size, self.num_shards)
    first = {(self._next_row + r) % self.num_shards for r in self._rows}
    return {(f + k) % self.num_shards for f in first for k in range(0, self.num_shards, step)}

  def _shard(self, index: int) -> Pipeline:
    if index not in self._shards:
      self._shards[index] = Pipeline(
        self.corpus.open_shard(index),
        Packer(
          self._options.length, pack=self._options.pack, whole=self.corpus.overflow != "split"
        ),
        self.corpus,
        endless=self._endless,
      )
    return self._shards[index]

  def _check_stream(self, saved: Mapping[str, Any]) -> None:
    # The saved definition went through JSON, which turns tuples into lists.
    expected = json.loads(json.dumps(self._definition))
    for name in expected | dict(saved):
      if expected.get(name) != saved.get(name):
        raise ValueError(
          f"the saved data position belongs to another stream: {name} was {saved.get(name)!r}, "
          f"is {expected.get(name)!r}"
        )


def _entry(shard: int) -> str:
  return f"shard_{shard:05d}"


def open_dataset(
  spec: DataSpec,
  tokenizer: Tokenizer,
  *,
  rows: Sequence[int],
  multiple: int = 1,
  scanned: Sequence[Table] | None = None,
) -> BatchIterator:
  """Opens a dataset as a stream of batches.

  Args:
    spec: The dataset.
    tokenizer: The run's tokenizer.
    rows: Rows of every batch that this process reads, in [0, batch_size).
    multiple: Number of which the number of batches is a multiple, if it is known; batches of
      padding are appended if necessary.
    scanned: The rows of its sources, if they have been scanned before.

  Raises:
    ValueError: The data does not match `spec`.
  """
  passes = count = None
  if spec.is_rows:
    corpus = row_corpus.open_corpus(spec, tokenizer, scanned)
    if spec.passes is not None and spec.count_tokens:
      passes = spec.passes

      def count(wanted: range, *, next_row: int = 0) -> int:
        batches = epochs.count_batches(corpus, spec, wanted, next_row=next_row)
        return -(-batches // multiple) * multiple

      if not count(range(1)):
        raise ValueError(
          f"{corpus.label} has no row with a token to train on: {corpus.skipped.describe()}"
        )
  else:
    with stderr.tensorflow_import():
      from ll3m.data import seqio_corpus
    corpus = seqio_corpus.open_corpus(spec, tokenizer)
  options = spec.config.seqio_dataset
  definition = {
    name: value
    for name, value in to_dict(spec.config).items()
    if name not in _MAY_CHANGE and value != _ADDED.get(name, _NONE)
  } | {
    "type": "rows" if spec.config.data is not None and spec.is_rows else spec.config.type,
    "seqio_dataset.split": options.split or spec.split_default,
    "seqio_dataset.shuffle": spec.shuffle,
    "seqio_dataset.num_shards": corpus.num_shards,
    "number of examples": corpus.num_examples,
    "tokenizer": tokenizer.fingerprint,
    "seed": spec.seed,
    "repeat": not spec.is_evaluation,
  }
  if spec.eval_fraction:
    definition["eval_fraction"] = spec.eval_fraction
  if any(source.weight for source in spec.sources):
    definition["weights"] = [source.weight for source in spec.sources]
  return BatchIterator(
    corpus,
    options,
    rows=rows,
    endless=spec.passes is None,
    definition=definition,
    passes=passes,
    count=count,
  )
