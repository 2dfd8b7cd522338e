"""Streams of batches for Python programs: `ll3m.data.load`, and one function per kind of source.

Their batches are those of ll3m.train with flags of the same names.
"""

import os
from collections.abc import Sequence
from typing import Any

from ll3m.data.batching import BatchIterator, open_dataset
from ll3m.data.config import (
  DEFAULT_SEED,
  DatasetConfig,
  HuggingFaceDatasetConfig,
  JsonDatasetConfig,
  SeqioDatasetConfig,
  TextProcessorConfig,
)
from ll3m.data.dataset_spec import resolve
from ll3m.data.tokenizer import Tokenizer


def load(
  data: str | os.PathLike[str],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  data_format: str = "auto",
  prompt_template: str | None = None,
  completion: str | None = None,
  plain_text: str = "file",
  epochs: int | None = None,
  eval_fraction: float = 0.0,
  held_out: bool = False,
  **options: Any,
) -> BatchIterator:
  """Reads data of any kind and shape as batches of packed rows.

  Args:
    data: What to read: files, globs, folders, names of Hugging Face datasets or a mixture, with
      commas between them; see docs/dataset.md.
    tokenizer: The model's tokenizer.
    batch_size: B, the number of sequences in a batch over all devices.
    length: T, the number of tokens in a sequence.
    data_format: Shape of the rows; by default, it is recognised from their columns.
    prompt_template: Text that is not trained on, with columns in braces, for rows of any columns.
    completion: Text that is trained on, with columns in braces.
    plain_text: Unit of plain text files that becomes a document: "file", "paragraph" or "line".
    epochs: Number of passes through the data, after which the stream ends; endless by default.
      `num_batches` of the result is then known.
    eval_fraction: Fraction of the rows to hold out for evaluation.
    held_out: Whether to read the held-out rows, once and in order, instead of the others.
    **options: The `**options` of `mixture`, and `overflow`: what happens to a document that is
      longer than a row ("split", "truncate", "keep_end" or "drop").

  Returns:
    An iterator over `ll3m.Batch` of [B, T].

  Raises:
    FileNotFoundError: Nothing has this name.
    ValueError: No row is usable, the shape is not recognised, or an option is invalid.
  """
  if epochs is not None and epochs < 1:
    raise ValueError(f"epochs must be at least 1, got {epochs}")
  if held_out and not eval_fraction:
    raise ValueError("held_out needs eval_fraction")
  dataset = {
    "data": os.fspath(data),
    "data_format": data_format,
    "prompt_template": prompt_template,
    "completion": completion,
    "plain_text": plain_text,
    "overflow": options.pop("overflow", None),
  }
  if held_out:
    options.setdefault("shuffle", False)
  elif epochs is not None:
    options["passes"] = epochs
  return _open(
    dataset,
    tokenizer,
    batch_size=batch_size,
    length=length,
    eval_fraction=eval_fraction,
    is_evaluation=held_out,
    **options,
  )


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
      the shape is recognised from the columns.
    **options: The `**options` of `mixture`.

  Returns:
    An iterator over `ll3m.Batch` of [B, T], endless unless `repeat=False`.

  Raises:
    FileNotFoundError: No file matches.
    ValueError: No row is usable, or an option is invalid.
  """
  dataset = {
    "type": "json",
    "json_dataset": JsonDatasetConfig(os.fspath(path)),
    "text_processor": TextProcessorConfig(fields),
  }
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
  dataset = {
    "type": "huggingface",
    "huggingface_dataset": HuggingFaceDatasetConfig(os.fspath(path), name, split, streaming),
    "text_processor": TextProcessorConfig(fields),
  }
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
    **options: `shuffle` (True): visit documents in a random order. `seed` (42): seed of that order.
      `repeat` (True): restart at the end. `pack` (True): fill rows with consecutive documents
      instead of one document each. `num_shards` (1 for `load`, else 8): number of independent
      pipelines, which determines the order. `strict` (False): raise an error for an unusable row
      instead of skipping it. `rows` (all): rows of each batch that this process reads, if there are
      several processes.

  Raises:
    FileNotFoundError: Shards are missing.
    ValueError: The name is unknown, or an option is invalid.
  """
  return _open(
    {"type": "seqio"},
    tokenizer,
    batch_size=batch_size,
    length=length,
    data_dir=data_dir,
    seqio={"mixture_or_task_name": name, "module": module, "split": split},
    **options,
  )


def _open(
  dataset: dict[str, Any],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  data_dir: str | None = None,
  seqio: dict[str, Any] | None = None,
  shuffle: bool = True,
  seed: int = DEFAULT_SEED,
  repeat: bool = True,
  passes: int | None = None,
  eval_fraction: float = 0.0,
  is_evaluation: bool = False,
  pack: bool = True,
  num_shards: int | None = None,
  strict: bool = False,
  rows: Sequence[int] | None = None,
) -> BatchIterator:
  config = DatasetConfig(
    **dataset,
    seqio_dataset=SeqioDatasetConfig(
      batch_size=batch_size,
      task_feature_lengths=(length,),
      shuffle=shuffle,
      pack=pack,
      num_shards=num_shards,
      **(seqio or {}),
    ),
  )
  spec = resolve(
    config,
    data_dir=data_dir,
    seed=seed,
    passes=passes if repeat else 1,
    strict=strict,
    eval_fraction=eval_fraction,
    is_evaluation=is_evaluation,
  )
  if passes is not None:
    spec = spec.counted()
  return open_dataset(spec, tokenizer, rows=range(batch_size) if rows is None else rows)
