"""Streams of batches for Python programs: `ll3m.data.jsonl`, `.huggingface` and `.mixture`.

They give the same batches as ll3m.train with flags of the same names.
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
    batch_size: B, sequences in a batch over all devices.
    length: T, tokens in a sequence.
    fields: The fields that make up a document, as `"[prompt],answer"`; see docs/dataset.md.
      By default messages where a row has them, else text.
    **options: Those of `mixture` from `shuffle` on.

  Returns:
    An endless iterator over `ll3m.Batch` of [B, T], unless `repeat=False`.

  Raises:
    FileNotFoundError: no file matches.
    ValueError: no row is usable, or an option makes no sense.
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
    path: A repository or local folder, as `datasets.load_dataset` takes it.
    tokenizer: The model's tokenizer.
    batch_size: As for `jsonl`.
    length: As for `jsonl`.
    fields: As for `jsonl`.
    name: The dataset's configuration.
    split: The dataset's split, as "train[:1%]"; "train" by default.
    streaming: Whether to read over the network while training.
    **options: Those of `mixture` from `shuffle` on.

  Raises:
    ValueError: no row is usable, or an option makes no sense.
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
    batch_size: As for `jsonl`.
    length: As for `jsonl`.
    module: A Python module to import first.
    split: The split; "train" by default.
    data_dir: The folder of the text shards; $LL3M_DATA_DIR or ./data by default.
    **options: `shuffle` (True): visit documents in a random order. `seed` (0): the seed of that
      order. `repeat` (True): start again at the end. `pack` (True): fill rows with consecutive
      documents instead of one each. `num_shards` (8): independent pipelines that fix the order.
      `strict` (False): raise for a row that cannot be used instead of skipping it. `rows` (all):
      the rows of each batch that this process reads, of several processes.

  Raises:
    FileNotFoundError: shards are missing.
    ValueError: an unknown name, or an option makes no sense.
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
