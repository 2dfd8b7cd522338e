"""Interfaces of a stream's source: documents in shards, with positions that can be saved."""

import abc

from ll3m.data.packing import Document
from ll3m.data.skipped_examples import Skipped


class DocumentIterator(abc.ABC):
  """Iterator over the documents of one shard."""

  def __iter__(self) -> "DocumentIterator":
    return self

  @abc.abstractmethod
  def __next__(self) -> Document:
    """Returns the next document, which is empty if its example was unusable."""

  @property
  def is_hopeless(self) -> bool | None:
    """Whether a whole pass of the shard had no usable example; None if passes are unknown."""
    return None

  @abc.abstractmethod
  def state(self) -> bytes:
    """Returns the position, including all buffered data."""

  @abc.abstractmethod
  def set_state(self, state: bytes) -> None:
    """Moves to a position that `state()` returned.

    Raises:
      ValueError: The position does not match the corpus.
    """


class Corpus(abc.ABC):
  """A text source bound to a run.

  Attributes:
    label: Name of the source in messages.
    num_shards: Number of shards; lower than requested if there are fewer examples.
    num_examples: Number of examples, or None if unknown.
    skipped: Unusable examples so far.
    overflow: What happens to documents that are longer than a row; see `packing.fit`.
  """

  label: str
  num_shards: int
  num_examples: int | None
  skipped: Skipped
  overflow: str

  @abc.abstractmethod
  def open_shard(self, shard: int) -> DocumentIterator:
    """Opens a shard at its beginning."""
