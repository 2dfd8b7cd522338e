"""Text in, batches out: tokenizers, seqio tasks and mixtures, packing, resumable streams.

`jsonl`, `huggingface` and `mixture` open a stream of batches; see `ll3m.data.loaders`.
"""

from typing import Any

__all__ = ["huggingface", "jsonl", "mixture"]


def __getattr__(name: str) -> Any:
  # Loaded when it is asked for: `import ll3m` takes no time.
  if name in __all__:
    from ll3m.data import loaders

    return getattr(loaders, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
