"""Data pipeline from text to batches: tokenizers, seqio tasks, packing and resumable streams.

`load`, `jsonl`, `huggingface` and `mixture` open a stream of batches (`ll3m.data.loaders`); `show`
prints a batch as text (`ll3m.data.preview`).
"""

import importlib
from typing import Any

_HOMES = {
  "huggingface": "ll3m.data.loaders",
  "jsonl": "ll3m.data.loaders",
  "load": "ll3m.data.loaders",
  "mixture": "ll3m.data.loaders",
  "show": "ll3m.data.preview",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
  # Imported on first use, so that `import ll3m` is fast.
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
