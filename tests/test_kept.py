"""Kept outcomes: computed once for the same sources, and again after a source has changed."""

import pytest

from tests import kept


class Cache(dict):
  """pytest's cache, in memory."""

  def set(self, key, value):
    self[key] = value


@pytest.fixture
def root(tmp_path):
  (tmp_path / "kernels").mkdir()
  (tmp_path / "kernels" / "kernel.py").write_text("first")
  return tmp_path


def test_outcome_is_computed_once_for_each_case_and_source(root):
  cache, found = Cache(), []

  def get(*case):
    kept.digest.cache_clear()  # as in another process
    return kept.KeptOutcomes(cache, root).get(case, lambda: found.append(case) or {1: (case[0],)})

  assert get("a") == get("a") == {"1": ["a"]}  # a kept outcome equals a new one
  assert get("b") == {"1": ["b"]}
  assert found == [("a",), ("b",)]
  (root / "kernels" / "kernel.py").write_text("second")
  get("a")
  (root / "kernels" / "notes.md").write_text("not a source")
  get("a")
  assert found == [("a",), ("b",), ("a",)]


def test_failure_is_not_kept(root):
  def fails():
    raise RuntimeError("refused")

  outcomes = kept.KeptOutcomes(Cache(), root)
  for _ in range(2):
    with pytest.raises(RuntimeError, match="refused"):
      outcomes.get(["a"], fails)
  assert outcomes.get(["a"], lambda: 1) == 1
