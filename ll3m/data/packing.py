"""Rows of exactly T tokens, cut from a sequence of documents.

A segment is the part of one document that lies in one row. Segment ids count from 1 within a row,
where 0 is padding, and positions restart at each segment.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ll3m.data.skipped_examples import Unusable


class Row(NamedTuple):
  """One sequence of a batch."""

  inputs: Int32[np.ndarray, "T"]
  targets: Int32[np.ndarray, "T"]  # the next token of the same segment
  mask: Float32[np.ndarray, "T"]  # 1 where the target counts for the loss
  segment_ids: Int32[np.ndarray, "T"]  # 1.. per document, 0 for padding
  positions: Int32[np.ndarray, "T"]  # within the segment


class Document(NamedTuple):
  """Tokens and their loss flags: 1 if predicting the token is trained, else 0."""

  tokens: Int32[np.ndarray, "n"]
  loss: Int32[np.ndarray, "n"]


def fit(document: Document, length: int, overflow: str, *, prefix: Sequence[int] = ()) -> Document:
  """Returns what is left of a document that may be longer than a row.

  Args:
    document: The document.
    length: T, the length of a row.
    overflow: "split" for a document that may continue in the next row, "truncate" to keep its
      beginning, "keep_end" to keep its end (and `prefix`), "drop" to keep nothing.
    prefix: Token ids with which documents begin, such as BOS.

  Raises:
    Unusable: Nothing is left to train on.
  """
  tokens, loss = document
  if overflow == "split" or len(tokens) <= length:
    return document
  if overflow == "drop":
    raise Unusable(f"longer than {length} tokens")
  if overflow == "truncate":
    kept = Document(tokens[:length], loss[:length])
  else:
    head = len(prefix) if tokens[: len(prefix)].tolist() == list(prefix) else 0
    end = len(tokens) - (length - head)
    kept = Document(*(np.concatenate([part[:head], part[end:]]) for part in (tokens, loss)))
  if not kept.loss[1:].any():
    raise Unusable(f"no token to train on within {length} tokens (overflow={overflow})")
  return kept


# With whole documents, a row is filled from the documents waiting in this many rows' tokens.
_CHOICE = 4


class Packer:
  """Row packer, which places every token of its documents in exactly one row.

  With `pack`, a row holds T consecutive tokens of the documents. A document that does not fit
  continues in the next row, as another segment. Without `pack`, every document starts a new row.

  With `pack` and `whole`, no document of at most T tokens is divided. A row takes the document that
  has waited longest, and then, in order, the waiting ones that still fit; the rest is padding.
  """

  def __init__(self, length: int, *, pack: bool, whole: bool = False):
    """Creates an empty packer.

    Args:
      length: T, the length of a row.
      pack: Whether documents share rows.
      whole: Whether documents stay whole.
    """
    self._length, self._pack, self._whole = length, pack, whole
    self._enough = length * (_CHOICE if whole else 1)
    self._pending: collections.deque[Document] = collections.deque()
    self._num_pending = 0  # tokens

  def add(self, document: Document) -> None:
    """Appends a document of at least one token."""
    self._pending.append(document)
    self._num_pending += len(document.tokens)

  def row(self, *, last: bool = False) -> Row | None:
    """Removes and returns the next row, or returns None if there are too few tokens to fill one.

    Args:
      last: Whether no document will follow, so that a row may end in padding.
    """
    segments = self.segments(last=last)
    return None if segments is None else make_row(segments, self._length)

  def segments(self, *, last: bool = False) -> list[Document] | None:
    """Removes and returns the segments of the next row; see `row`."""
    enough = self._num_pending >= self._enough if self._pack else self._pending
    if not enough and not (last and self._pending):
      return None
    segments = self._take_whole() if self._pack and self._whole else self._take()
    self._num_pending -= sum(len(segment.tokens) for segment in segments)
    return segments

  def _take(self) -> list[Document]:
    """Removes the first T tokens of the pending documents, or those of the first document."""
    segments, room = [], self._length
    while room and self._pending and (self._pack or not segments):
      document = self._pending.popleft()
      segments.append(Document(*(part[:room] for part in document)))
      if len(document.tokens) > room:
        self._pending.appendleft(Document(*(part[room:] for part in document)))
      room -= len(segments[-1].tokens)
    return segments

  def _take_whole(self) -> list[Document]:
    """Removes pending documents that fit into a row together."""
    segments, left, room = [], [], self._length
    for document in self._pending:
      if len(document.tokens) <= room:
        segments.append(document)
        room -= len(document.tokens)
      else:
        left.append(document)
    self._pending = collections.deque(left)
    return segments

  def state(self) -> dict[str, np.ndarray]:
    """Returns the tokens that are not yet part of a returned row."""
    return {
      "lengths": np.array([len(d.tokens) for d in self._pending], np.int64),
      "tokens": np.concatenate([np.zeros(0, np.int32), *(d.tokens for d in self._pending)]),
      "loss": np.concatenate([np.zeros(0, np.int32), *(d.loss for d in self._pending)]),
    }

  def set_state(self, state: dict[str, np.ndarray]) -> None:
    """Restores a state that `state()` returned."""
    cuts = np.cumsum(state["lengths"])[:-1] if len(state["lengths"]) else []
    parts = zip(np.split(state["tokens"], cuts), np.split(state["loss"], cuts), strict=True)
    self._pending = collections.deque(Document(*p) for p in parts if len(p[0]))
    self._num_pending = int(state["lengths"].sum())


def make_row(segments: list[Document], length: int) -> Row:
  """Places segments in a row of T tokens, padded at the end.

  Args:
    segments: Segments of at most T tokens in total; an empty list gives a row of padding.
    length: T, the length of the row.
  """
  row = Row(*(np.zeros(length, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))
  start = 0
  for number, (tokens, loss) in enumerate(segments, start=1):
    end = start + len(tokens)
    row.inputs[start:end] = tokens
    # The first token of a segment is never a target.
    row.targets[start : end - 1] = tokens[1:]
    row.mask[start : end - 1] = loss[1:]
    row.segment_ids[start:end] = number
    row.positions[start:end] = np.arange(len(tokens))
    start = end
  return row
