"""Estimates that were made before, so that what was interrupted goes on where it stopped."""

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
  """What `estimate` is called with.

  Attributes:
    generation: of the TPU.
    builder: as there.
    arguments: as there.
    sources: files, and folders of Python and JSON files, that decide the estimate.
    count_products: as there.
    whole_program: as there.
  """

  generation: str
  builder: str
  arguments: dict[str, Any]
  sources: tuple[str, ...]
  count_products: bool = False
  whole_program: bool = False

  @property
  def key(self) -> str:
    """Tells tasks apart, and those of other sources or of another compiler."""
    return json.dumps([_digest(self.sources), *self._replace(sources=())], sort_keys=True)


class Ledger:
  """A file of JSON lines, one for each estimate or for why there cannot be one."""

  def __init__(self, path: Path):
    """Reads what is there; the file is made with the first estimate."""
    self._path = path
    self._lock = threading.Lock()
    self._known: dict[str, list[Kernel] | str] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
      try:
        key, result = json.loads(line)
      except ValueError:
        continue  # the last line of a run that was killed
      self._known[key] = result if isinstance(result, str) else [Kernel(*k) for k in result]

  def run(
    self, tasks: Sequence[Task], *, workers: int, seconds: float
  ) -> Iterator[tuple[Task, list[Kernel] | str]]:
    """Makes the estimates that are not there yet.

    Args:
      tasks: what to estimate; the same one is estimated once.
      workers: how many compile at a time.
      seconds: that each may take.

    Yields:
      Each task, as it is done, with its estimate, or with why there is none.
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
      return str(error)  # not kept
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
  """Stands for the compiler and the code that an estimate depends on."""
  digest = hashlib.sha256()
  for package in ("jax", "libtpu"):
    digest.update(importlib.metadata.version(package).encode())
  for source in map(Path, sources):
    inner = [path for path in source.rglob("*") if path.suffix in (".py", ".json")]
    for path in sorted(inner) if source.is_dir() else [source]:
      digest.update(path.read_bytes())
  return digest.hexdigest()[:16]
