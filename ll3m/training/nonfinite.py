"""What is done about steps whose loss or gradient is not finite."""

import json

import jax
import numpy as np
from etils import epath

from ll3m.data.batch import Batch
from ll3m.data.tokenizer import Tokenizer
from ll3m.training.logger import say
from ll3m.training.step import StepMetrics

FOLDER = "nonfinite"


class NonFiniteWatch:
  """Writes down which documents such a step had, and ends the run when they do not stop.

  `make_train_step` has left parameters and optimizer as they were.
  """

  def __init__(self, output_dir: epath.PathLike, tokenizer: Tokenizer | None, limit: int):
    """Args: the run's folder; gives the text, if any; how many such steps in a row are too many."""
    self._folder = epath.Path(output_dir) / FOLDER
    self._tokenizer, self._limit = tokenizer, limit
    self._in_a_row = 0

  def look(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
    """Waits for a step and looks at it.

    Args:
      step: its number, from 1.
      metrics: of the step, on the devices.
      batch: this process's rows of it, [A, b, T].

    Raises:
      FloatingPointError: it is the last of too many in a row.
    """
    if not float(metrics.skipped):
      self._in_a_row = 0
      return
    self._in_a_row += 1
    self._folder.mkdir(parents=True, exist_ok=True)
    file = self._folder / f"step_{step}.process_{jax.process_index()}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in self._documents(batch)))
    say(f"step {step}: loss or gradient not finite, nothing was updated; its documents: {file}")
    if self._in_a_row >= self._limit:
      raise FloatingPointError(
        f"the loss or gradient of {self._in_a_row} steps in a row ({step - self._in_a_row + 1} to "
        f"{step}) was not finite; the parameters are those of step {step - self._in_a_row}; the "
        f"documents are in {self._folder}; lower the learning rate, or look at the data"
      )

  def _documents(self, batch: Batch) -> list[dict[str, int | str]]:
    """Lists what each row [A, b] consists of, in the order of the data."""
    return [
      {
        "micro_step": micro_step,
        "row": row,
        "segment": int(segment),
        "text": self._text(batch.inputs[micro_step, row][ids == segment].tolist()),
      }
      for (micro_step, row), ids in (
        (index, batch.segment_ids[index]) for index in np.ndindex(batch.segment_ids.shape[:2])
      )
      for segment in np.unique(ids[ids != 0])
    ]

  def _text(self, tokens: list[int]) -> str:
    return str(tokens) if self._tokenizer is None else self._tokenizer.decode(tokens)
