"""One attempt to compile a program, which may exceed the memory of a device."""

import dataclasses
import re
import time

import jax

from ll3m.planning import hlo
from ll3m.training.memory import used_bytes

# The compiler's messages about a program that is too large, before and after scheduling.
_NEEDED = re.compile(
  r"required for HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Attempt:
  """Result of compiling a program.

  Attributes:
    seconds: Compile time.
    used_bytes: Bytes of one device's main memory: arguments, results, temporaries and code. If the
      program does not fit, this is the compiler's rounded estimate.
    module: Compiled module; None if the program does not fit.
  """

  seconds: float
  used_bytes: int
  module: hlo.Module | None


def compile_program(lowered: jax.stages.Lowered) -> Attempt:
  """Compiles a program that was lowered for devices that are not available here.

  Raises:
    jax.errors.JaxRuntimeError: Compilation failed for a reason other than memory.
  """
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = needed_bytes(error)
    if needed is None:
      raise
    return Attempt(time.perf_counter() - start, needed, None)
  seconds = time.perf_counter() - start
  return Attempt(seconds, used_bytes(compiled), hlo.read(compiled))


def needed_bytes(error: Exception) -> int | None:
  """Returns the bytes per device that a compiler error says are needed; None if it says nothing."""
  needed = _NEEDED.search(str(error))
  if needed is None:
    return None
  number, unit = (part for part in needed.groups() if part is not None)
  return int(float(number) * _UNITS[unit])
