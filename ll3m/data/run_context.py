"""Settings of the run for which seqio tasks are read.

seqio tasks are defined once, at import, and a seqio Feature keeps its vocabulary from then on. The
run's tokenizer and data folder are therefore looked up in this module when a task's pipeline is
built, so that every run can use the same definitions.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence

from ll3m.data.shard_files import text_shards
from ll3m.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunContext:
  """The settings of the run for which a pipeline is being built.

  Attributes:
    tokenizer: The run's tokenizer.
    data_dir: Folder of the text shards; None for the default.
    shard: Index of the shard of the stream.
    files: Listed text shards, by source and split; missing entries are added on demand.
  """

  tokenizer: Tokenizer
  data_dir: str | None = None
  shard: int = 0
  files: dict[tuple[str, str], Sequence[str]] = dataclasses.field(default_factory=dict)

  def text_shards(self, source: str, split: str) -> Sequence[str]:
    """Returns the text shards of a source, which are listed at most once per run.

    Raises:
      FileNotFoundError: A shard is missing.
    """
    if (source, split) not in self.files:
      self.files[source, split] = text_shards(self.data_dir, source, split)
    return self.files[source, split]


_CURRENT: contextvars.ContextVar[RunContext] = contextvars.ContextVar("run_context")


def current() -> RunContext:
  """Returns the context of the run whose pipeline is being built.

  Raises:
    RuntimeError: The call is outside of `use`.
  """
  try:
    return _CURRENT.get()
  except LookupError:
    raise RuntimeError("a task's pipeline was built outside of run_context.use(...)") from None


@contextlib.contextmanager
def use(context: RunContext) -> Iterator[None]:
  """Makes `context` the current one inside a `with` statement."""
  token = _CURRENT.set(context)
  try:
    yield
  finally:
    _CURRENT.reset(token)
