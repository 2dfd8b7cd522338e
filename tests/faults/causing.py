"""Causes of faults: killed processes, flipped bits, full disks.

Random choices are drawn from a seed, which pytest shows when a test fails and LL3M_FAULT_SEED
repeats. `make soak` sets LL3M_SOAK, which determines the number of repetitions.
"""

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

from tests.compiled import quickly
from tests.preloaded import Command

SOAK = bool(os.environ.get("LL3M_SOAK"))
REPETITIONS = 20 if SOAK else 4
PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


class Job:
  """A training run in a process of its own, whose output can be waited for."""

  def __init__(
    self,
    arguments: list[str],
    output: Path,
    *,
    file_limit: int | None = None,
    memory_limit: int | None = None,
    compiles: bool = False,
  ):
    """Starts the run.

    Args:
      arguments: The run's flags.
      output: The run's output_dir.
      file_limit: Maximum size of a file in bytes; writing more fails as on a full disk.
      memory_limit: Bytes of address space, including threads and mapped files.
      compiles: Whether to compile programs even if another run has already compiled them.
    """
    self.output = output
    self._log = output.with_suffix(".log")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if not compiles:
      environment |= quickly()
    self._log.write_text("")
    self._process = Command(
      "train",
      *arguments,
      f"--logger.output_dir={output}",
      env=environment,
      log=self._log,
      compiles=compiles,
    )
    limits = {resource.RLIMIT_FSIZE: file_limit, resource.RLIMIT_AS: memory_limit}
    for what, most in limits.items():
      if most is not None:
        resource.prlimit(self._process.pid, what, (most, most))

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *exception) -> None:
    if self.running():
      self._process.kill()
    self._process.wait()

  def running(self) -> bool:
    return self._process.poll() is None

  def said(self) -> str:
    return self._log.read_text()

  def wait_for(self, event: Callable[[], object], seconds: float = 120) -> None:
    """Waits until `event` returns true.

    Raises:
      AssertionError: The process ended, or the time was up.
    """
    deadline = time.monotonic() + seconds
    while not event():
      assert self.running() and time.monotonic() < deadline, self.said()
      time.sleep(0.002)

  def signal(self, number: int) -> None:
    self._process.send_signal(number)

  def end(self, seconds: float = 120) -> int:
    """Waits for the end of the run and returns its exit code; fails if that takes longer."""
    return self._process.wait(seconds)


def files(folder: Path) -> dict[str, bytes]:
  """Returns the contents of every file below a folder, by path in the folder."""
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in sorted(folder.rglob("*"))
    if file.is_file()
  }


def flip(file: Path, chance: random.Random) -> None:
  """Flips a random bit of a file."""
  data = bytearray(file.read_bytes())
  bit = chance.randrange(8 * len(data))
  data[bit // 8] ^= 1 << bit % 8
  file.write_bytes(data)


def truncate(file: Path, chance: random.Random) -> None:
  """Cuts a file at a random place."""
  file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def delete(file: Path, chance: random.Random) -> None:
  """Deletes a file."""
  del chance
  file.unlink()
