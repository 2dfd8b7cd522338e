"""Outcomes of compiling for TPUs, kept in pytest's cache until their inputs change.

Compilation takes minutes, and its outcome depends only on the sources and the installed packages.
`pytest --cache-clear` deletes all outcomes.
"""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ALL_SOURCES = ("ll3m", "kernels", "benchmarks")
# The sources that a kernel alone depends on; the families define its shapes.
KERNEL_SOURCES = ("kernels", "benchmarks", "ll3m/core", "ll3m/families", "ll3m/hf")


class KeptOutcomes:
  """Outcomes by compiled case, sources, and versions of all packages."""

  def __init__(self, cache: pytest.Cache, root: Path = ROOT):
    self._cache, self._root = cache, root

  def get(
    self,
    case: Sequence[Any],
    find: Callable[[], Any],
    sources: tuple[str, ...] = ALL_SOURCES,
  ) -> Any:
    """Returns a kept outcome, or computes and keeps it.

    Args:
      case: The case that `find` compiles, as JSON values.
      find: A function that returns the outcome as JSON values. Exceptions are not kept, so every
        run reports a failure.
      sources: Folders whose Python files determine the outcome.
    """
    text = json.dumps([digest(self._root, sources), *case])
    key = f"compiled/{hashlib.sha256(text.encode()).hexdigest()}"
    outcome = self._cache.get(key, None)
    if outcome is None:
      outcome = json.loads(json.dumps(find()))
      self._cache.set(key, outcome)
    return outcome


@functools.cache
def digest(root: Path, sources: tuple[str, ...]) -> str:
  """Returns a digest of the sources below a root and of the installed packages."""
  found = hashlib.sha256()
  for package in sorted(importlib.metadata.distributions(), key=lambda p: str(p.name)):
    found.update(f"{package.name} {package.version}\n".encode())
  for path in sorted(path for name in sources for path in (root / name).rglob("*.py")):
    found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  return found.hexdigest()
