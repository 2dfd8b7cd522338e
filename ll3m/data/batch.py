"""What the data room hands to the trainer. NumPy only: importing it does not load TensorFlow."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
  """Rows of packed documents; arrays of one shape [B, T] (or [A, B, T], A micro-steps).

  Attributes:
    inputs: int32 tokens.
    targets: int32, the next token of the same document.
    mask: float32, 1 where the loss counts; 0 at a document's last token and in padding.
    segment_ids: int32, 1, 2, ... by document within the row; 0 is padding.
    positions: int32, counted from 0 in each document.
  """

  inputs: Any
  targets: Any
  mask: Any
  segment_ids: Any
  positions: Any
