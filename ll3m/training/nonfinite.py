"""Handling of steps with a non-finite loss or gradient."""

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
  """Records the documents of non-finite steps, and ends the run after too many in a row.

  The step from `make_train_step` has already left parameters and optimizer state unchanged.
  """

  def __init__(self, output_dir: epath.PathLike, tokenizer: Tokenizer | None, limit: int):
    """Starts a count of consecutive non-finite steps.

    Args:
      output_dir: Folder of the run.
      tokenizer: Decoder of the documents; None to write token ids.
      limit: Number of consecutive non-finite steps that ends the run.
    """
    self._folder = epath.Path(output_dir) / FOLDER
    self._tokenizer, self._limit = tokenizer, limit
    self._in_a_row = 0

  def look(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
    """Waits for a step and checks whether it was finite.

    Args:
      step: Number of the step, from 1.
      metrics: Metrics of the step, on the devices.
      batch: This process's rows of the step, [A, b, T].

    Raises:
      FloatingPointError: The limit of consecutive non-finite steps is reached.
    """
    if not float(metrics.skipped):
      self._in_a_row = 0
      return
    self._in_a_row += 1
    self._folder.mkdir(parents=True, exist_ok=True)
    file = self._folder / f"step_{step}.process_{jax.process_index()}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in self._documents(batch)))
    say(f"step {step}: non-finite loss or gradient, update skipped; documents written to {file}")
    if self._in_a_row >= self._limit:
      raise FloatingPointError(
        f"the loss or gradient of {self._in_a_row} consecutive steps ({step - self._in_a_row + 1} "
        f"to {step}) was not finite; the parameters are those of step {step - self._in_a_row}; the "
        f"documents are in {self._folder}; lower the learning rate or inspect the data"
      )

  def _documents(self, batch: Batch) -> list[dict[str, int | str]]:
    """Returns a record for each document of each row [A, b], in the order of the data."""
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
