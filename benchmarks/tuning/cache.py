"""A cache of estimates, so that an interrupted run can resume."""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tuning.estimates import Kernel, NotPricedError, UnfinishedError, estimate


class Task(NamedTuple):
  """The arguments of a call of `estimate`.

  Attributes:
    generation: TPU generation.
    builder: See `estimate`.
    arguments: See `estimate`.
    sources: Files, and folders of Python and JSON files, that the estimate depends on.
    count_products: See `estimate`.
    whole_program: See `estimate`.
  """

  generation: str
  builder: str
  arguments: dict[str, Any]
  sources: tuple[str, ...]
  count_products: bool = False
  whole_program: bool = False

  @property
  def key(self) -> str:
    """The key in the cache, which depends on the task, its sources and the compiler."""
    return json.dumps([_digest(self.sources), *self._replace(sources=())], sort_keys=True)


class Ledger:
  """A JSON-lines file of estimates, or of the reasons why there are none."""

  def __init__(self, path: Path):
    """Reads the file if it exists; the first estimate creates it."""
    self._path = path
    self._lock = threading.Lock()
    self._known: dict[str, list[Kernel] | str] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
      try:
        key, result = json.loads(line)
      except ValueError:
        continue  # the incomplete last line of a killed run
      self._known[key] = result if isinstance(result, str) else [Kernel(*k) for k in result]

  def run(
    self, tasks: Sequence[Task], *, workers: int, seconds: float
  ) -> Iterator[tuple[Task, list[Kernel] | str]]:
    """Yields all estimates, and makes those that are not in the file yet.

    Args:
      tasks: Tasks to estimate; equal ones are estimated once.
      workers: Number of parallel compilations.
      seconds: Time limit of each estimate.

    Yields:
      Each task, in order of completion, with its estimate or the reason why there is none.
    """
    unique = {task.key: task for task in tasks}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      futures = {}
      for key, task in unique.items():
        if key in self._known:
          yield task, self._known[key]
        else:
          futures[pool.submit(self._estimate, task, seconds)] = task
      try:
        for future in concurrent.futures.as_completed(futures):
          yield futures[future], future.result()
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise

  def _estimate(self, task: Task, seconds: float) -> list[Kernel] | str:
    try:
      result = estimate(
        task.generation,
        task.builder,
        task.arguments,
        count_products=task.count_products,
        whole_program=task.whole_program,
        seconds=seconds,
      )
    except UnfinishedError as error:
      return str(error)  # not cached, since another try may succeed
    except NotPricedError as error:
      result = str(error)
    with self._lock:
      self._known[task.key] = result
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with self._path.open("a", encoding="utf-8") as file:
        file.write(json.dumps([task.key, result]) + "\n")
    return result


@functools.cache
def _digest(sources: tuple[str, ...]) -> str:
  """Returns a digest of the compiler and the code that an estimate depends on."""
  digest = hashlib.sha256()
  for package in ("jax", "libtpu"):
    digest.update(importlib.metadata.version(package).encode())
  for source in map(Path, sources):
    inner = [path for path in source.rglob("*") if path.suffix in (".py", ".json")]
    for path in sorted(inner) if source.is_dir() else [source]:
      digest.update(path.read_bytes())
  return digest.hexdigest()[:16]
