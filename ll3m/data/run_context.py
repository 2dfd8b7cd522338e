"""What a task may ask about the run it is read for.

seqio tasks are defined once, at import, and a seqio Feature holds on to its vocabulary from then
on. The run's own tokenizer and data folder are therefore looked up here when a task's pipeline
is built, so that the same definitions serve every run.
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
    shard: Which of the stream's shards.
    files: The text shards that were listed, by source and split; what is missing is added.
  """

  tokenizer: Tokenizer
  data_dir: str | None = None
  shard: int = 0
  files: dict[tuple[str, str], Sequence[str]] = dataclasses.field(default_factory=dict)

  def text_shards(self, source: str, split: str) -> Sequence[str]:
    """Returns the text shards of a source; lists them at most once in a run.

    Raises:
      FileNotFoundError: if any is missing.
    """
    if (source, split) not in self.files:
      self.files[source, split] = text_shards(self.data_dir, source, split)
    return self.files[source, split]


_CURRENT: contextvars.ContextVar[RunContext] = contextvars.ContextVar("run_context")


def current() -> RunContext:
  """Returns the run whose pipeline is being built.

  Raises:
    RuntimeError: outside of `use`.
  """
  try:
    return _CURRENT.get()
  except LookupError:
    raise RuntimeError("a task's pipeline was built outside of run_context.use(...)") from None


@contextlib.contextmanager
def use(context: RunContext) -> Iterator[None]:
  """Makes `context` the current one."""
  token = _CURRENT.set(context)
  try:
    yield
  finally:
    _CURRENT.reset(token)
