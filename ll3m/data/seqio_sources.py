"""Sources of documents: seqio data sources that can be split into any number of shards."""

import functools
import importlib.metadata
import zlib
from collections.abc import Callable, Sequence
from typing import Any, SupportsInt, override

import numpy as np
import seqio
import tensorflow as tf
from absl import logging

from ll3m.data import run_context
from ll3m.data.seqio_vocabulary import map_graph, python_op
from ll3m.data.shard_files import SPLITS

# One in this many of the built-in documents is held out for validation.
_HELD_OUT = 10
# Size of a shard's shuffle buffer of example numbers, which is saved with every checkpoint.
_INDEX_BUFFER = 512


class TextShardSource(seqio.DataSource):
  """TFRecord shards with `id` and `text` in the run's data folder (see `tools/prepare_text.py`).

  If there are at least as many files as shards, each shard reads its own files. Otherwise each
  shard reads every file and keeps its share of the examples.
  """

  supports_arbitrary_sharding = True

  def __init__(self, name: str):
    """Sets the folder `{data_dir}/{name}`, with files `{split}-00000-of-00032.tfrecord`, ..."""
    super().__init__(splits=SPLITS)
    self._name = name

  @override
  def list_shards(self, split: str) -> Sequence[str]:
    return run_context.current().text_shards(self._name, split)

  @override
  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **_: Any,
  ) -> tf.data.Dataset:
    index, count = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    files = self.files(split, index, count)
    by_file = len(self.list_shards(split)) >= count
    dataset = tf.data.Dataset.from_tensor_slices(files)
    # Files are shuffled only if each file belongs to one shard. Shards that divide the examples of
    # all files must read the examples in the same order.
    if by_file and shuffle:
      dataset = dataset.shuffle(len(files), seed=seed)
    dataset = dataset.interleave(_records, cycle_length=4, block_length=16)
    if not by_file:
      dataset = dataset.shard(count, index)
    return map_graph(dataset, _parse_text)

  def files(self, split: str, index: int, count: int) -> Sequence[str]:
    """Returns the files that shard `index` of `count` shards reads."""
    files = self.list_shards(split)
    return files[index::count] if len(files) >= count else files


@tf.autograph.experimental.do_not_convert
def _records(file: tf.Tensor | str) -> tf.data.Dataset:
  return tf.data.TFRecordDataset(file, buffer_size=1 << 18)


def _parse_text(record: tf.Tensor) -> dict[str, tf.Tensor]:
  return tf.io.parse_single_example(record, {"text": tf.io.FixedLenFeature([], tf.string)})


def find_damaged(files: Sequence[str]) -> str | None:
  """Returns the first text shard that cannot be read to its end, or None.

  TensorFlow reports the position of the damage but not the file, so the files are read to find it.
  """
  logging.warning("reading failed: checking %d files to find the damaged one", len(files))
  count = tf.autograph.experimental.do_not_convert(lambda number, _: number + 1)
  for file in files:
    try:
      map_graph(_records(file), _parse_text).reduce(np.int64(0), count)
    except tf.errors.OpError:
      return file
  return None


class IndexedSource(seqio.DataSource):
  """Examples that can be fetched by number, so that a position is a number too.

  With shuffling, all examples are permuted once, pseudo-randomly, and in every pass each shard
  draws from a shuffle buffer. The buffer holds numbers, not tokenised documents.
  """

  supports_arbitrary_sharding = True

  def __init__(
    self,
    load: Callable[[str], Sequence[str]],
    splits: Sequence[str] = SPLITS,
  ):
    """Stores the function that loads the examples.

    Args:
      load: Function that returns the examples of a split, called when the first pipeline is built.
      splits: Splits that `load` accepts.
    """
    super().__init__(splits=splits, performs_internal_shuffling=True)
    self._load = functools.cache(load)

  @override
  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  @override
  def num_input_examples(self, split: str) -> None:
    return None  # a number would make seqio cache the examples in memory a second time

  @override
  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **_: Any,
  ) -> tf.data.Dataset:
    examples = self._load(split)
    index, count = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    last = len(examples) - 1
    dataset = tf.data.Dataset.range(index, last + 1, count)
    if shuffle and last > 0:
      key = tf.constant([seed or 0, 0], tf.int64)
      dataset = map_graph(
        dataset, lambda i: tf.random.experimental.index_shuffle(i, key, max_index=last)
      )
      dataset = dataset.shuffle(_INDEX_BUFFER, seed=seed)

    def fetch(i: SupportsInt) -> bytes:
      return examples[int(i)].encode("utf-8", errors="replace")

    def to_features(i: tf.Tensor) -> dict[str, tf.Tensor]:
      text = python_op(fetch, [i], tf.string)
      text.set_shape([])
      return {"text": text}

    return map_graph(dataset, to_features)


def python_reference(split: str) -> list[str]:
  """Returns the language reference that is part of every CPython, one document per topic."""
  from pydoc_data.topics import topics

  return [topics[name] for name in sorted(topics) if _is_held_out(name) == (split != "train")]


def package_descriptions(split: str) -> list[str]:
  """Returns the long descriptions of the installed distributions, one document each."""
  descriptions = {}
  for distribution in importlib.metadata.distributions():
    metadata = distribution.metadata
    text = metadata.get("Description") or metadata.get_payload() or ""
    if metadata.get("Name") and len(text.strip()) > len("UNKNOWN"):
      descriptions[metadata["Name"].lower()] = text.strip()
  return [text for n, text in sorted(descriptions.items()) if _is_held_out(n) == (split != "train")]


def _is_held_out(name: str) -> bool:
  """Returns whether a document is held out.

  This depends only on its name, so that a document keeps its split whatever else is installed.
  """
  return zlib.crc32(name.encode()) % _HELD_OUT == 0
