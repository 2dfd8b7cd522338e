"""Opens a dataset in one call."""

from collections.abc import Sequence
from typing import Any

from ll3m.data import batching
from ll3m.data.config import DatasetConfig
from ll3m.data.dataset_spec import resolve
from ll3m.data.tokenizer import Tokenizer


def open_dataset(
  config: DatasetConfig, tokenizer: Tokenizer, *, rows: Sequence[int], **settings: Any
) -> batching.BatchIterator:
  """Opens a stream; `settings` are those of `resolve`."""
  return batching.open_dataset(resolve(config, **settings), tokenizer, rows=rows)
