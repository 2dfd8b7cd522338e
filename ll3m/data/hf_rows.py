"""Datasets that the `datasets` library loads."""

from collections.abc import Sequence

import datasets

from ll3m.data.config import HuggingFaceDatasetConfig
from ll3m.data.row_files import row_to_json


def load_huggingface(
  options: HuggingFaceDatasetConfig,
  split_default: str,
) -> datasets.Dataset | datasets.IterableDataset:
  """Opens a dataset, downloading it first unless it is streamed.

  Args:
    options: which one.
    split_default: the split where the options leave it open.

  Raises:
    ValueError: if it cannot be opened.
  """
  split = options.split or split_default
  try:
    return datasets.load_dataset(
      options.path, options.name, split=split, streaming=options.streaming
    )
  except Exception as error:  # of the many libraries below `datasets`
    raise ValueError(
      f"huggingface dataset {options.path!r} (name {options.name!r}, split {split!r}) "
      f"cannot be loaded: {error}"
    ) from error


class HuggingFaceRows(Sequence[bytes]):
  """The rows of a downloaded dataset as JSON objects, by number."""

  def __init__(self, rows: datasets.Dataset):
    """Wraps a dataset."""
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> bytes:
    return row_to_json(self._rows[index])
