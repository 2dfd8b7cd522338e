"""Profiler traces of selected steps, for xprof."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ll3m.core.object_store import is_remote
from ll3m.training.logger import say

# Subfolder of output_dir. TensorBoard and xprof look for traces in its `plugins/profile`.
FOLDER = "profile"


def parse_steps(text: str, total_steps: int) -> range:
  """Parses "FIRST:LAST", both included.

  Args:
    text: Value of the option.
    total_steps: Number of steps in the run.

  Raises:
    ValueError: The text is malformed, or its steps are not within the run.
  """
  match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last <= total_steps:
    raise ValueError(
      f"`profile_steps` must be FIRST:LAST, both within 1..{total_steps} (`total_steps`), "
      f"got {text!r}"
    )
  return range(first, last + 1)


class Profiler:
  """Tracer of selected steps on host and devices; each process traces itself.

  Use as a context manager around all steps: on exit, an active trace is stopped and written. jax
  writes traces to local disks only; for an object store, they are copied afterwards.
  """

  def __init__(self, output_dir: str, steps: range, *, made: int = 0):
    """Selects the steps to trace.

    Args:
      output_dir: Folder of the run.
      steps: Steps to trace.
      made: Number of steps that are already finished.
    """
    self._folder = epath.Path(output_dir) / FOLDER
    self._steps = steps[max(0, made + 1 - steps.start) :]
    self._tracing = False
    self._local: tempfile.TemporaryDirectory | None = None
    if steps and not self._steps:
      say(f"nothing to trace: step {made} is finished, and profile_steps ends at {steps[-1]}")

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *exception: Any) -> None:
    self._stop()

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Annotates the work of a step, and starts the trace at the first selected step.

    Args:
      number: Number of the step, from 1.
    """
    if number in self._steps and not self._tracing:
      if is_remote(self._folder):
        self._local = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._folder if self._local is None else self._local.name)
      self._tracing = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def finish(self, number: int, result: Any) -> None:
    """Stops the trace once the devices have finished the last selected step.

    Args:
      number: Number of the step.
      result: Arrays that the step computes.
    """
    if self._tracing and number >= self._steps[-1]:
      jax.block_until_ready(result)
      self._stop()

  def _stop(self) -> None:
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      if self._local is not None:
        with self._local as folder:
          _copy(Path(folder), self._folder)


def _copy(folder: Path, place: epath.Path) -> None:
  """Copies all files in a folder and its subfolders."""
  for file in filter(Path.is_file, folder.rglob("*")):
    to = place / file.relative_to(folder)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(file.read_bytes())
