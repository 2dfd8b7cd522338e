"""One pipeline of a stream of batches: a shard's documents, packed into rows."""

from collections.abc import Mapping

import numpy as np
from absl import logging

from ll3m.data.corpus import Corpus, DocumentIterator
from ll3m.data.packing import Packer, Row

# A shard whose passes are unknown fails after this many consecutive unusable documents.
_PATIENCE = 10_000


class Pipeline:
  """One pipeline of the stream, from documents to rows.

  A shard of an endless stream whose rows are all unusable gives padding, with a warning.

  Attributes:
    exhausted: Whether the documents have ended, or none of many is usable.
    num_read: Number of usable documents read since the shard was opened.
    has_target: Whether any of these documents has a trained token.
  """

  def __init__(self, documents: DocumentIterator, packer: Packer, corpus: Corpus, *, endless: bool):
    self._documents, self._packer, self._corpus = documents, packer, corpus
    self._endless = endless
    self.exhausted = self.has_target = False
    self.num_read = 0

  def next_row(self) -> Row | None:
    """Returns the next row, or None at the end of a stream that does not repeat."""
    idle = 0
    while (row := self._packer.row(last=self.exhausted)) is None and not self.exhausted:
      document = next(self._documents, None)
      if document is None:
        self.exhausted = True
      elif len(document.tokens):
        self._packer.add(document)
        self.num_read += 1
        self.has_target = self.has_target or bool(document.loss[1:].any())
        idle = 0
        continue
      idle += 1
      if self._endless and (self.exhausted or self._is_hopeless(idle)):
        self._end()
    return row

  def _is_hopeless(self, idle: int) -> bool:
    """Returns whether no document of an endless shard is usable, after `idle` unusable ones."""
    hopeless = self._documents.is_hopeless
    return idle > _PATIENCE if hopeless is None else hopeless

  def _end(self) -> None:
    """Ends an endless shard without usable documents.

    Raises:
      ValueError: The shard has no documents at all, or it is unknown whether one is usable.
    """
    if self.exhausted or self._documents.is_hopeless is None:
      why = self._corpus.skipped.describe()
      raise ValueError(
        f"{self._corpus.label}: a shard has no usable document; "
        + (why or "lower seqio_dataset.num_shards or provide more data")
      )
    self.exhausted = True
    logging.warning(
      "%s: one of %d pipelines has no usable example, so its rows are padding; %s",
      self._corpus.label,
      self._corpus.num_shards,
      self._corpus.skipped.describe(),
    )

  def state(self) -> dict[str, np.ndarray]:
    """Returns the position, as arrays."""
    documents = np.frombuffer(self._documents.state(), np.uint8)
    return self._packer.state() | {
      "documents": documents,
      "exhausted": np.array(self.exhausted),
    }

  def set_state(self, state: Mapping[str, np.ndarray]) -> None:
    """Moves to a position that `state()` returned."""
    self._documents.set_state(state["documents"].tobytes())
    self._packer.set_state({name: state[name] for name in ("lengths", "tokens", "loss")})
    # More passes may have been asked for since the documents ended.
    self.exhausted = self._endless and bool(state["exhausted"])
