"""Outcomes of compiling for TPUs, kept in pytest's cache until something that decides them changes.

Compiling takes minutes, and its outcome depends on nothing but the sources and the installed
packages. `pytest --cache-clear` forgets all outcomes.
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
# What a kernel alone depends on: the families give its shapes.
KERNEL_SOURCES = ("kernels", "benchmarks", "ll3m/core", "ll3m/families", "ll3m/hf")


class KeptOutcomes:
  """Outcomes by what was compiled, the sources, and the versions of all packages."""

  def __init__(self, cache: pytest.Cache, root: Path = ROOT):
    self._cache, self._root = cache, root

  def get(
    self,
    case: Sequence[Any],
    find: Callable[[], Any],
    sources: tuple[str, ...] = ALL_SOURCES,
  ) -> Any:
    """Returns an outcome, which is found only where no earlier run has kept it.

    Args:
      case: What `find` compiles, as JSON values.
      find: Returns the outcome as JSON values. What it raises is not kept, so that a failure is
        seen in every run.
      sources: Folders whose Python files decide the outcome.
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
  """Stands for the sources below a root and for the installed packages."""
  found = hashlib.sha256()
  for package in sorted(importlib.metadata.distributions(), key=lambda p: str(p.name)):
    found.update(f"{package.name} {package.version}\n".encode())
  for path in sorted(path for name in sources for path in (root / name).rglob("*.py")):
    found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  return found.hexdigest()
