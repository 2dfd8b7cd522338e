"""Opens a dataset in one call."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ll3m.data import batching, chat
from ll3m.data.config import DatasetConfig, TextProcessorConfig
from ll3m.data.dataset_spec import resolve
from ll3m.data.examples import choose_shape
from ll3m.data.text_processor import TextProcessor
from ll3m.data.tokenizer import Tokenizer


def encode_chat(tokenizer: Tokenizer, rendered: chat.Rendered) -> tuple[np.ndarray, np.ndarray]:
  """Returns the token ids of a conversation, and which are trained."""
  ((ids, loss),) = tokenizer.encode_batch([tokenizer.seal(rendered.text, rendered.spans)])
  return np.array(ids, np.int32), loss


def processor_for(
  tokenizer: Tokenizer, row: dict[str, Any], fields: str = "", **options: Any
) -> TextProcessor:
  """Returns the processor of rows like `row`; `options` are those of `TextProcessorConfig`."""
  config = DatasetConfig(text_processor=TextProcessorConfig(fields, **options))
  return TextProcessor(choose_shape(config, row, "the row"), tokenizer)


def open_dataset(
  config: DatasetConfig,
  tokenizer: Tokenizer,
  *,
  rows: Sequence[int],
  repeat: bool = True,
  split_default: str | None = None,
  **settings: Any,
) -> batching.BatchIterator:
  """Opens a stream for training, or for evaluation if it does not repeat.

  `split_default` is the split to read if the options name none; other settings are those of
  `resolve`.
  """
  split = split_default or (None if repeat else "train")
  for group in ("seqio_dataset", "huggingface_dataset"):
    options = getattr(config, group)
    if options.split is None and split is not None:
      config = dataclasses.replace(config, **{group: dataclasses.replace(options, split=split)})
  spec = resolve(config, is_evaluation=not repeat, **settings)
  return batching.open_dataset(spec, tokenizer, rows=rows)
