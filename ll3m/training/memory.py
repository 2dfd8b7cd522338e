"""Memory of a training step, and smaller micro-batches for machines that lack it."""

from collections.abc import Callable
from typing import Any

import jax
import psutil

from ll3m.data.batch import Batch

# Share of a host's free memory that a step on CPUs may use: other programs, the data and the next
# checkpoint need some, too.
_SHARE = 0.8


def used_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes of one device's memory that a program needs while it runs."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )


def total_bytes(device: jax.Device) -> int | None:
  """Returns the memory of a device, or of the host for CPUs; None if it is unknown."""
  if device.platform == "cpu":
    return psutil.virtual_memory().total
  return (device.memory_stats() or {}).get("bytes_limit")


def compile_to_fit(
  step: Callable[..., Any], state: Any, shapes: Callable[[int], Batch], *, fewest: int, most: int
) -> tuple[jax.stages.Compiled, int]:
  """Compiles a training step for CPUs with the largest micro-batches that fit into free memory.

  The parameters and the optimizer state must already be in memory.

  Args:
    step: Jitted training step.
    state: Shapes of the training state.
    shapes: Function from a number of parts to the shapes of a batch whose micro-batches are divided
      into so many.
    fewest: Smallest number of parts, which is tried first.
    most: Largest number of parts.

  Returns:
    The compiled step, and the number of parts; the smallest micro-batches if none fits.
  """
  free = psutil.virtual_memory().available * _SHARE
  parts = fewest
  while True:
    compiled = step.lower(state, shapes(parts)).compile()
    present = compiled.memory_analysis().argument_size_in_bytes
    if 2 * parts > most or used_bytes(compiled) - present <= free:
      return compiled, parts
    parts *= 2


def describe(needed: int, device: jax.Device, *, rows: int, parts: int) -> str:
  """Returns a line about the memory that a training step needs, and the machine's.

  Args:
    needed: Bytes that the step needs per device.
    device: One of the devices.
    rows: Number of rows of a micro-batch before it was divided.
    parts: Number of parts into which it was divided.
  """
  total = total_bytes(device)
  of = "" if total is None else f" of {total / 2**30:.1f} GiB"
  divided = f", in {parts} micro-batches of {rows // parts} to fit" if parts > 1 else ""
  return f"memory      {needed / 2**30:.1f} GiB{of} per step{divided}"


def divide(batch: Batch, parts: int) -> Batch:
  """Divides the micro-batches of a batch [A, b, T] into parts: [A * parts, b / parts, T]."""

  def split(array: Any) -> Any:
    steps, rows, length = array.shape
    return array.reshape(steps * parts, rows // parts, length)

  return jax.tree.map(split, batch)
