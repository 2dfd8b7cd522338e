"""What a stream reads from: documents in shards, each with a position that can be saved."""

import abc

from ll3m.data.packing import Document
from ll3m.data.skipped_examples import Skipped


class DocumentIterator(abc.ABC):
  """The documents of one shard, in order."""

  def __iter__(self) -> "DocumentIterator":
    return self

  @abc.abstractmethod
  def __next__(self) -> Document:
    """Returns the next document; one without tokens was unusable."""

  @abc.abstractmethod
  def state(self) -> bytes:
    """Returns the position, with everything that is buffered."""

  @abc.abstractmethod
  def set_state(self, state: bytes) -> None:
    """Moves to a position that `state()` gave.

    Raises:
      ValueError: if the position does not fit.
    """


class Corpus(abc.ABC):
  """A text source bound to a run.

  Attributes:
    label: what to call it in messages.
    num_shards: how many shards it is read in; fewer than asked for when there are fewer examples.
    num_examples: how many there are, where that is known.
    skipped: the examples that were unusable so far.
  """

  label: str
  num_shards: int
  num_examples: int | None
  skipped: Skipped

  @abc.abstractmethod
  def open_shard(self, shard: int) -> DocumentIterator:
    """Opens one of the shards at its beginning."""
