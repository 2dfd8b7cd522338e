"""Opens a dataset in one call."""

from collections.abc import Sequence
from typing import Any

from ll3m.data import batches
from ll3m.data.config import DatasetConfig
from ll3m.data.spec import resolve
from ll3m.data.tokenizer import Tokenizer


def open_dataset(
  config: DatasetConfig, tokenizer: Tokenizer, *, rows: Sequence[int], **settings: Any
) -> batches.BatchIterator:
  """Opens a stream; `settings` are those of `resolve`."""
  return batches.open_dataset(resolve(config, **settings), tokenizer, rows=rows)
