"""The batch that the data package passes to the trainer.

This module does not import TensorFlow.
"""

from typing import Any, NamedTuple


class Batch(NamedTuple):
  """Packed rows of documents, as arrays of shape [B, T] or, with A micro-steps, [A, B, T].

  Attributes:
    inputs: Tokens, int32.
    targets: Next token of the same document, int32.
    mask: Loss mask, float32; 0 at a document's last token and in padding, 1 where the loss counts.
    segment_ids: Number of the document within the row, int32, from 1; 0 is padding.
    positions: Position within the document, int32, from 0.
  """

  inputs: Any
  targets: Any
  mask: Any
  segment_ids: Any
  positions: Any
