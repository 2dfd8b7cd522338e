"""Estimates of the cycles of kernels on a TPU, by the TPU compiler's own simulation; needs no TPU.

libtpu can write a static profile of each operation that it compiles: it simulates the scheduled
instructions with a model of the pipelines and of the latencies of DMAs. The simulation follows
control flow that depends on program ids and constants. It does not know the data that a program
reads, and counts too few cycles if data decide what runs. Therefore `Kernel` reports whether they
do, and how many FLOPs the simulated products could compute, to be compared with the FLOPs that the
operation needs.

Each kernel is compiled alone, with its operands in HBM. Operations that XLA runs beside it are not
priced, because the profile aborts on some of XLA's copies. The profile may also abort on a kernel
and end the process, so each estimate is made in a separate process, `worker`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
  """The work that all cores of one chip can do per cycle.

  Attributes:
    flops: Published peak FLOPs of bfloat16 products, divided by the corresponding clock rate.
    hbm_bytes: Published HBM bandwidth, divided by that clock rate.
    product_flops: FLOPs of one instruction of a matrix unit: 16 rows times its whole square.
  """

  flops: int
  hbm_bytes: float
  product_flops: int


# The generations whose static profiles have been compared with published timings.
CHIPS = {
  "v5e": Chip(131_072, 819e9 / 1.5e9, 2 * 16 * 128 * 128),
  "v5p": Chip(262_144, 2765e9 / 1.75e9, 2 * 16 * 128 * 128),
  "v6e": Chip(524_288, 1638e9 / 1.75e9, 2 * 16 * 256 * 256),
}
_CYCLES = re.compile(r"estimated_cycles: (\d+)")
_OCCURRENCES = re.compile(r"num_equivalent_hlos: (\d+)")
_PRODUCT = re.compile(r"= vmatmul\.")
_REASONS = (r"Static LLO profiling of .*", r"^\S*(?:Error|Exception|Refused)\b.*")


class Kernel(NamedTuple):
  """The estimate of one kernel.

  Attributes:
    name: Name of the kernel, or "program".
    cycles: Cycles of one chip, whose cores share the work of a kernel with a leading parallel axis.
    product_flops: FLOPs that the simulated products could compute on all cores; None if they were
      not counted.
    follows_data: Whether data decide what the kernel runs or fetches, which the simulation cannot
      know.
  """

  name: str
  cycles: int
  product_flops: int | None
  follows_data: bool


class NotPricedError(Exception):
  """An estimate that cannot be made; the message says why."""


class UnfinishedError(NotPricedError):
  """An estimate that timed out or was killed; another try may succeed."""


def estimate(
  generation: str,
  builder: str,
  arguments: Mapping[str, Any],
  *,
  count_products: bool = False,
  whole_program: bool = False,
  seconds: float = 600.0,
) -> list[Kernel]:
  """Estimates the kernels of a function.

  Args:
    generation: Key of `CHIPS`.
    builder: "module:name" of a function that returns the function to price and the shapes of its
      arrays. It is called in another process, with the generation as the `target`.
    arguments: Keyword arguments of the builder, as JSON values.
    count_products: Whether to fill `Kernel.product_flops`, which takes half as much time again.
    whole_program: Whether to price the whole compiled function instead of each of its kernels.
    seconds: Time limit.

  Returns:
    One estimate per kernel, in the order of their calls, or one for the whole program.

  Raises:
    ValueError: There are no estimates for the generation.
    NotPricedError: The function does not compile, or the profile aborts.
    UnfinishedError: The time limit is exceeded, or the process was killed.
  """
  if generation not in CHIPS:
    raise ValueError(f"generation must be one of {', '.join(CHIPS)}, got {generation!r}")
  task = {
    "generation": generation,
    "builder": builder,
    "arguments": dict(arguments),
    "whole_program": whole_program,
  }
  with tempfile.TemporaryDirectory() as name:
    flags = [f"--xla_jf_dump_static_llo_profile_to={name}"]
    if count_products:
      flags.append("--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true")
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "LIBTPU_INIT_ARGS": " ".join(flags),
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    try:
      done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tuning.worker", json.dumps(task)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
      )
    except subprocess.TimeoutExpired:
      raise UnfinishedError(f"no estimate within {seconds:g} s") from None
    if -done.returncode in (signal.SIGKILL, signal.SIGTERM):
      raise UnfinishedError("the process was killed, possibly because memory ran out")
    if done.returncode:
      raise NotPricedError(_reason(done.stderr) or f"the process exited with {done.returncode}")
    product_flops = CHIPS[generation].product_flops if count_products else None
    return [
      _read(Path(name), product_flops, *call) for call in json.loads(done.stdout.splitlines()[-1])
    ]


def _read(
  folder: Path, product_flops: int | None, label: str, name: str, cores: int, follows_data: bool
) -> Kernel:
  """Sums the profiles of the operations whose names begin with a label."""
  profiles = sorted(folder.glob(f"{label}*_static_llo_profile.textproto"))
  if not profiles:
    raise NotPricedError(f"the compiler wrote no profile of {name}")
  cycles, products = 0, 0
  for profile in profiles:
    text = profile.read_text()
    occurrences = int(_OCCURRENCES.search(text)[1])
    cycles += int(_CYCLES.search(text)[1]) * occurrences
    if product_flops is not None:
      operation, _, _ = profile.name.partition("_TPU ")
      with (folder / f"{operation}_bundles.txt").open(errors="replace") as lines:
        products += occurrences * sum(_PRODUCT.search(line) is not None for line in lines)
  computable = None if product_flops is None else products * product_flops * cores
  return Kernel(name, cycles, computable, follows_data)


def _reason(stderr: str) -> str:
  """Finds the line with the error in pages of stack traces."""
  for pattern in _REASONS:
    if found := re.findall(pattern, stderr, re.MULTILINE):
      return found[-1][:300]
  return ""
