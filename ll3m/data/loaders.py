"""Streams of batches for Python programs: `ll3m.data.jsonl`, `.huggingface` and `.mixture`.

Their batches are those of ll3m.train with flags of the same names.
"""

import os
from collections.abc import Sequence
from typing import Any

from ll3m.data.batching import BatchIterator, open_dataset
from ll3m.data.config import (
  DatasetConfig,
  HuggingFaceDatasetConfig,
  JsonDatasetConfig,
  SeqioDatasetConfig,
  TextProcessorConfig,
)
from ll3m.data.dataset_spec import resolve
from ll3m.data.tokenizer import Tokenizer


def jsonl(
  path: str | os.PathLike[str],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  fields: str = "",
  **options: Any,
) -> BatchIterator:
  """Reads JSON Lines files as batches of packed rows.

  Args:
    path: A file or glob, local or gs://.
    tokenizer: The model's tokenizer.
    batch_size: B, the number of sequences in a batch over all devices.
    length: T, the number of tokens in a sequence.
    fields: Fields that form a document, e.g. `"[prompt],answer"`; see docs/dataset.md. By default,
      messages if a row has them, else text.
    **options: The `**options` of `mixture`.

  Returns:
    An iterator over `ll3m.Batch` of [B, T], endless unless `repeat=False`.

  Raises:
    FileNotFoundError: No file matches.
    ValueError: No row is usable, or an option is invalid.
  """
  dataset = DatasetConfig(
    type="json",
    json_dataset=JsonDatasetConfig(os.fspath(path)),
    text_processor=TextProcessorConfig(fields),
  )
  return _open(dataset, tokenizer, batch_size=batch_size, length=length, **options)


def huggingface(
  path: str | os.PathLike[str],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  fields: str = "",
  name: str | None = None,
  split: str | None = None,
  streaming: bool = False,
  **options: Any,
) -> BatchIterator:
  """Reads a dataset of the `datasets` library as batches of packed rows.

  Args:
    path: A repository or local folder, as accepted by `datasets.load_dataset`.
    tokenizer: The model's tokenizer.
    batch_size: See `jsonl`.
    length: See `jsonl`.
    fields: See `jsonl`.
    name: Configuration of the dataset.
    split: Split of the dataset, e.g. "train[:1%]"; "train" by default.
    streaming: Whether to read over the network while training.
    **options: The `**options` of `mixture`.

  Raises:
    ValueError: No row is usable, or an option is invalid.
  """
  dataset = DatasetConfig(
    type="huggingface",
    huggingface_dataset=HuggingFaceDatasetConfig(os.fspath(path), name, split, streaming),
    text_processor=TextProcessorConfig(fields),
  )
  return _open(dataset, tokenizer, batch_size=batch_size, length=length, **options)


def mixture(
  name: str,
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  module: str | None = None,
  split: str | None = None,
  data_dir: str | None = None,
  **options: Any,
) -> BatchIterator:
  """Reads a seqio mixture or task as batches of packed rows.

  Args:
    name: A mixture or task that comes with LL3M (docs/dataset.md) or that `module` registers.
    tokenizer: The model's tokenizer.
    batch_size: See `jsonl`.
    length: See `jsonl`.
    module: Python module to import first.
    split: Name of the split; "train" by default.
    data_dir: Folder of the text shards; $LL3M_DATA_DIR or ./data by default.
    **options: `shuffle` (True): visit documents in a random order. `seed` (0): seed of that order.
      `repeat` (True): restart at the end. `pack` (True): fill rows with consecutive documents
      instead of one document each. `num_shards` (8): number of independent pipelines, which
      determines the order. `strict` (False): raise an error for an unusable row instead of skipping
      it. `rows` (all): rows of each batch that this process reads, if there are several processes.

  Raises:
    FileNotFoundError: Shards are missing.
    ValueError: The name is unknown, or an option is invalid.
  """
  dataset = DatasetConfig(type="seqio")
  return _open(
    dataset,
    tokenizer,
    batch_size=batch_size,
    length=length,
    data_dir=data_dir,
    seqio={"mixture_or_task_name": name, "module": module, "split": split},
    **options,
  )


def _open(
  dataset: DatasetConfig,
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  data_dir: str | None = None,
  seqio: dict[str, Any] | None = None,
  shuffle: bool = True,
  seed: int = 0,
  repeat: bool = True,
  pack: bool = True,
  num_shards: int = 8,
  strict: bool = False,
  rows: Sequence[int] | None = None,
) -> BatchIterator:
  config = DatasetConfig(
    type=dataset.type,
    json_dataset=dataset.json_dataset,
    huggingface_dataset=dataset.huggingface_dataset,
    text_processor=dataset.text_processor,
    seqio_dataset=SeqioDatasetConfig(
      batch_size=batch_size,
      task_feature_lengths=(length,),
      shuffle=shuffle,
      pack=pack,
      num_shards=num_shards,
      **(seqio or {}),
    ),
  )
  spec = resolve(config, data_dir=data_dir, seed=seed, repeat=repeat, strict=strict)
  return open_dataset(spec, tokenizer, rows=range(batch_size) if rows is None else rows)
