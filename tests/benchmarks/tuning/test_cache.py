"""The cache of estimates: its reuse, and its invalidation if the sources change."""

import pytest

from benchmarks.tuning import cache
from benchmarks.tuning.cache import Ledger, Task
from benchmarks.tuning.estimates import Kernel, NotPricedError, UnfinishedError

KERNEL = Kernel("kernel", 123, 456, False)


@pytest.fixture
def made(monkeypatch):
  """Replaces the compiler, and returns a list of its requests."""
  asked = []

  def estimate(generation, builder, arguments, **options):
    asked.append(arguments["n"])
    if arguments["n"] == 0:
      raise UnfinishedError("the time is over")
    if arguments["n"] < 0:
      raise NotPricedError("it is negative")
    return [KERNEL._replace(cycles=arguments["n"])]

  monkeypatch.setattr(cache, "estimate", estimate)
  return asked


def tasks(*numbers, source):
  return [Task("v5e", "module:name", {"n": n}, (str(source),)) for n in numbers]


def run(path, chosen):
  return {
    task.arguments["n"]: result for task, result in Ledger(path).run(chosen, workers=2, seconds=1.0)
  }


def test_cached_estimates_are_reused(tmp_path, made):
  path, source = tmp_path / "folder" / "estimates.jsonl", tmp_path / "kernel.py"
  source.write_text("first")
  first = run(path, tasks(1, 2, 2, -1, source=source))
  assert first == {
    1: [KERNEL._replace(cycles=1)],
    2: [KERNEL._replace(cycles=2)],
    -1: "it is negative",
  }
  assert sorted(made) == [-1, 1, 2]
  with path.open("a") as file:
    file.write('["a line that was cut')
  assert run(path, tasks(1, 2, 3, -1, source=source)) == first | {3: [KERNEL._replace(cycles=3)]}
  assert sorted(made) == [-1, 1, 2, 3]


def test_unfinished_estimates_are_tried_again(tmp_path, made):
  path = tmp_path / "estimates.jsonl"
  for _ in range(2):
    assert run(path, tasks(0, source=tmp_path)) == {0: "the time is over"}
  assert made == [0, 0] and not path.exists()


def test_changed_sources_invalidate_estimates(tmp_path, made):
  path, folder = tmp_path / "estimates.jsonl", tmp_path / "kernels"
  folder.mkdir()
  (folder / "kernel.py").write_text("first")
  run(path, tasks(1, source=folder))
  (folder / "table.json").write_text("[]")
  cache._digest.cache_clear()
  run(path, tasks(1, source=folder))
  (folder / "notes.txt").write_text("nothing that decides")
  cache._digest.cache_clear()
  run(path, tasks(1, source=folder))
  assert made == [1, 1]


def test_unexpected_errors_propagate(tmp_path, monkeypatch):
  def broken(*_, **__):
    raise RuntimeError("unexpected")

  monkeypatch.setattr(cache, "estimate", broken)
  with pytest.raises(RuntimeError, match="unexpected"):
    run(tmp_path / "estimates.jsonl", tasks(1, source=tmp_path))
