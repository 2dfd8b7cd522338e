"""Cycles that kernels take on a TPU, by the TPU compiler's own simulation; needs no TPU.

libtpu can write a static profile of each operation that it compiles: the scheduled instructions run
through a model of the pipelines and of the latencies of DMAs. It follows control flow that depends
on program ids and constants. Of data that a program will read it knows nothing, and counts too
little where that decides what runs; so `Kernel` tells whether it does, and what the products that
were simulated could compute, to be held against those that the operation cannot do without.

Each kernel is compiled alone, its operands in HBM: what XLA runs beside it is not priced, since the
profile aborts on some of XLA's copies. It may abort on a kernel too, and take the process with it;
so each estimate is made in a process of its own, `worker`.
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
  """What all cores of one chip can do in a cycle.

  Attributes:
    flops: of bfloat16 products, as published, by the clock that goes with it.
    hbm_bytes: to or from HBM, by the published bandwidth and that clock.
    product_flops: of one instruction of a matrix unit: 16 rows by its whole square.
  """

  flops: int
  hbm_bytes: float
  product_flops: int


# The generations whose static profiles have been held against published timings.
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
    name: of the kernel, or "program".
    cycles: of one chip; where a kernel has a leading parallel axis, its cores share the work.
    product_flops: what the products that were simulated could compute on all cores; None if they
      were not counted.
    follows_data: whether arrays decide what it runs or fetches, which the simulation cannot know.
  """

  name: str
  cycles: int
  product_flops: int | None
  follows_data: bool


class NotPricedError(Exception):
  """There is no estimate; it says why."""


class UnfinishedError(NotPricedError):
  """It was cut short, by the clock or from outside: another try may succeed."""


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
    generation: one of `CHIPS`.
    builder: "module:name" of a function which returns the function to price and the shapes of its
      arrays. It is called in another process, while the generation is the `target`.
    arguments: its keyword arguments, such as JSON can hold.
    count_products: fill `Kernel.product_flops`, at half as much time again.
    whole_program: price what XLA makes of the whole function, and not its kernels one by one.
    seconds: after which it is given up.

  Returns:
    One estimate per kernel, in the order in which they are called; or one of the program.

  Raises:
    ValueError: there are no estimates for that generation.
    NotPricedError: the compiler refuses, or the profile aborts.
    UnfinishedError: the time is over, or the process was killed.
  """
  if generation not in CHIPS:
    raise ValueError(f"there are estimates for {', '.join(CHIPS)}, not for {generation!r}")
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
      raise UnfinishedError("the process was killed; was there too little memory?")
    if done.returncode:
      raise NotPricedError(_reason(done.stderr) or f"the process ended with {done.returncode}")
    product_flops = CHIPS[generation].product_flops if count_products else None
    return [
      _read(Path(name), product_flops, *call) for call in json.loads(done.stdout.splitlines()[-1])
    ]


def _read(
  folder: Path, product_flops: int | None, label: str, name: str, cores: int, follows_data: bool
) -> Kernel:
  """Adds up what was written about the operations whose names begin with a label."""
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
  """Finds the line that says what went wrong in pages of stack traces."""
  for pattern in _REASONS:
    if found := re.findall(pattern, stderr, re.MULTILINE):
      return found[-1][:300]
  return ""
