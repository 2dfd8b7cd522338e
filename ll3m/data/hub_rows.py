"""Rows of the `datasets` library: downloaded, or streamed with a position that can be saved."""

from collections.abc import Callable, Mapping
from typing import Any


def load_dataset(
  path: str, configuration: str | None, split: str, *, streaming: bool = False
) -> Any:
  """Opens a dataset, downloading it first unless it is streamed.

  Args:
    path: Dataset repository or local folder, as accepted by `datasets.load_dataset`.
    configuration: Name of the configuration, or None.
    split: Name of the split.
    streaming: Whether to stream.

  Returns:
    A `datasets.Dataset`, or a `datasets.IterableDataset` if it is streamed.

  Raises:
    ValueError: The dataset cannot be opened or is empty.
  """
  import datasets

  try:
    rows = datasets.load_dataset(path, configuration, split=split, streaming=streaming)
  except Exception as error:  # `datasets` uses many libraries, with exceptions of their own
    raise ValueError(
      f"there is no file or folder {path}, and the Hugging Face dataset {path!r} (name "
      f"{configuration!r}, split {split!r}) cannot be loaded: {error}"
    ) from error
  if not streaming and not len(rows):
    raise ValueError(f"{path} has no examples")
  return rows


class StreamedRows:
  """Rows of a `datasets.IterableDataset`, whose own state is the position.

  Attributes:
    num_passes: Number of completed passes.
  """

  def __init__(self, open_rows: Callable[[], Any], *, passes: int | None):
    # Reopened for every pass: a dataset moved to a position starts from that position again.
    self._open_rows, self._passes = open_rows, passes
    self.num_passes = 0
    self._start(open_rows())

  def __iter__(self) -> "StreamedRows":
    return self

  def __next__(self) -> dict[str, Any]:
    row = next(self._iterator, None)
    if row is None and (self._passes is None or self.num_passes + 1 < self._passes):
      self.num_passes += 1
      self._start(self._open_rows())
      row = next(self._iterator, None)
    if row is None:
      raise StopIteration
    return row

  def state(self) -> dict[str, Any]:
    """Returns the position in a form that JSON can represent."""
    return {"pass": self.num_passes, "rows": self._rows.state_dict()}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Moves to a position that `state()` returned."""
    rows = self._open_rows()
    # Positions of earlier versions are those of the rows alone.
    self.num_passes = state.get("pass", 0) if "rows" in state else 0
    rows.load_state_dict(state.get("rows", state))
    self._start(rows)

  def _start(self, rows: Any) -> None:
    self._rows, self._iterator = rows, iter(rows)
