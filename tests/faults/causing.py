"""Faults as they happen: processes that are killed, bits that flip, disks that are full.

Whatever is left to chance is drawn from a seed that pytest shows when a test fails, and which
LL3M_FAULT_SEED repeats. `make soak` sets LL3M_SOAK and with it the number of repetitions.
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
  """A training run in a process of its own, whose every line can be waited for."""

  def __init__(
    self,
    arguments: list[str],
    output: Path,
    *,
    file_limit: int | None = None,
    memory_limit: int | None = None,
    compiles: bool = False,
  ):
    """Starts it.

    Args:
      arguments: its flags.
      output: its output_dir.
      file_limit: bytes that no file may exceed: writing more fails as on a full disk.
      memory_limit: bytes of address space, in which threads and mapped files count too.
      compiles: even if another run has compiled the same.
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
    """Returns once the event is true.

    Raises:
      AssertionError: the process ended or the time was up before.
    """
    deadline = time.monotonic() + seconds
    while not event():
      assert self.running() and time.monotonic() < deadline, self.said()
      time.sleep(0.002)

  def signal(self, number: int) -> None:
    self._process.send_signal(number)

  def end(self, seconds: float = 120) -> int:
    """Returns the exit code; it is not allowed to take longer."""
    return self._process.wait(seconds)


def files(folder: Path) -> dict[str, bytes]:
  """Every file below a folder, by its path in it."""
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in sorted(folder.rglob("*"))
    if file.is_file()
  }


def flip(file: Path, chance: random.Random) -> None:
  """Turns one bit of a file."""
  data = bytearray(file.read_bytes())
  bit = chance.randrange(8 * len(data))
  data[bit // 8] ^= 1 << bit % 8
  file.write_bytes(data)


def truncate(file: Path, chance: random.Random) -> None:
  """Cuts a file at a random place."""
  file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def delete(file: Path, chance: random.Random) -> None:
  """Loses a file."""
  del chance
  file.unlink()
