"""Compiles every kernel for every TPU generation, with the real compiler and no TPU.

  python -m benchmarks.tpu_check [--generations=v5e,v6e] [--kernels=flash_attention] [--quick]

Prints a row per operation, shape and generation: the compile time, the program's temporary bytes
by the compiler's memory analysis, and the vector memory that the compiler allocated for the blocks
and scratch of each kernel. Exits with code 1 if anything does not compile.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: libtpu must not look for chips

from benchmarks import tpu_cases
from ll3m.core import flags, options
from ll3m_kernels import dispatch
from ll3m_kernels.dispatch import MIB


@dataclasses.dataclass(frozen=True)
class CheckConfig:
  """The choice of programs to compile."""

  generations: str = options.option(
    ",".join(dispatch.GENERATIONS), "Generations to compile for, separated by commas."
  )
  kernels: str = options.option("", "Operations to compile, separated by commas; all by default.")
  quick: bool = options.option(False, "Compile only the shapes of the test suite.")

  def __post_init__(self):
    for name in self.generations.split(","):
      if name not in dispatch.GENERATIONS:
        raise ValueError(
          f"`generations` expects any of {', '.join(dispatch.GENERATIONS)}, got {name!r}"
        )


FLAG_GROUPS = {"": CheckConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Compiles case by case; see `flags.call` for `argv` and the exit code."""
  return flags.call(_check, FLAG_GROUPS, argv, doc=__doc__)


def _check(given: flags.Flags) -> None:
  """Compiles case by case."""
  from ll3m_kernels.tpu_compiler import compile_for, vmem_bytes

  config = given[""]
  cases = list(tpu_cases.slice_of_cases() if config.quick else tpu_cases.all_cases())
  chosen = set(filter(None, config.kernels.split(","))) or {case.kernel for case in cases}
  if unknown := chosen - {case.kernel for case in cases}:
    raise ValueError(f"`kernels` names operations without cases: {', '.join(sorted(unknown))}")
  print(
    f"{'operation':20} {'shape':30} {'dtype':5} {'TPU':6} {'seconds':>7} {'temp MiB':>8}  "
    "MiB of vector memory"
  )
  count, failures = 0, []
  for case in cases:
    for generation in config.generations.split(",") if case.kernel in chosen else ():
      row = f"{case.kernel:20} {case.name:30} {case.dtype:5} {generation:6}"
      start = time.perf_counter()
      try:
        compiled = compile_for(generation, case.function, *case.arrays)
        memory = vmem_bytes(compiled)
        failed = case.has_kernel and not memory
        outcome = f"{compiled.memory_analysis().temp_size_in_bytes / MIB:8.1f}  {_text(memory)}"
      except Exception as error:  # any error of the compiler is a result
        failed, outcome = True, f"FAILED: {' '.join(str(error).split())[:200]}"
      print(f"{row} {time.perf_counter() - start:7.1f} {outcome}", flush=True)
      count += 1
      if failed:
        failures.append(row)
  print(f"{count - len(failures)} of {count} compiled")
  if failures:
    raise ValueError(f"{len(failures)} of {count} did not compile: {'; '.join(failures[:5])}")


def _text(memory: dict[str, int]) -> str:
  """Lists each kernel once, with its maximum memory and its number of occurrences."""
  names = [name.rpartition(".")[0] for name in memory]
  largest = {}
  for name, size in zip(names, memory.values(), strict=True):
    largest[name] = max(size, largest.get(name, 0))
  parts = (
    f"{name} {size / MIB:.1f}" + (f" (x {names.count(name)})" if names.count(name) > 1 else "")
    for name, size in largest.items()
  )
  return ", ".join(parts) or "no kernel in the module"


if __name__ == "__main__":
  sys.exit(main())
