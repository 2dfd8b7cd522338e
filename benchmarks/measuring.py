"""Timing of validated operations, and their rates.

Rates come from the median of the rounds. FLOPs and bytes are those that the operation requires, not
those that an implementation spends: bytes count every input and output of a pass once.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import validation
from benchmarks.cases import Case

PASSES = ("forward", "forward+backward")
# The approximate duration of all rounds in seconds, and their minimum and maximum number.
_BUDGET, _FEWEST, _MOST = 1.0, 5, 50


class Work(NamedTuple):
  """The work of one call: floating-point operations, bytes read and written, tokens."""

  flops: float
  nbytes: float
  tokens: int


def is_accelerated() -> bool:
  """Returns whether jax's default backend is not a CPU."""
  return jax.default_backend() != "cpu"


def implementation() -> str:
  """Returns the implementation that is timed: the kernels on a TPU, else plain jnp."""
  return "pallas" if jax.default_backend() == "tpu" else "xla"


def dtype() -> Any:
  """Returns the dtype that is measured: float32 on a CPU, else bfloat16."""
  return jnp.bfloat16 if is_accelerated() else jnp.float32


def bench_case(
  benchmark: Any, make_case: Callable[..., Case], model: str, passes: str, **options: Any
) -> None:
  """Validates an operation, then times it.

  Args:
    benchmark: Fixture of pytest-benchmark.
    make_case: Function (model, size, dtype, **options) -> case.
    model: Model whose shapes are used.
    passes: One of `PASSES`.
    **options: Options of the case.

  Raises:
    AssertionError: An implementation is wrong; nothing was timed.
  """
  errors, checked = _validated(make_case, model, dtype(), **options)
  full, case = (
    make_case(model, size, dtype(), **options)
    for size in ("full", "full" if is_accelerated() else "cpu")
  )
  timed = implementation() if implementation() in case.implementations else "xla"
  arrays, cotangents = validation.draw(case)
  if passes == "forward":
    function, inputs = validation.forward(case, timed), (arrays,)
  else:
    function, inputs = validation.with_gradients(case, timed), (arrays, cotangents)
  facts = {
    "implementation": timed,
    "dtype": jnp.dtype(dtype()).name,
    "shape": _text(case.dims),
    "reduced": reduction(full.dims, case.dims),
    "validated": f"{_text(checked.dims)}{_mode(case)}",
    "largest_error": max(errors.values()),
    "errors": errors,
    "rate": case.rate,
  }
  work = work_of(case, passes, arrays, cotangents)
  time_and_record(benchmark, lambda: function(*inputs), work, facts)


def work_of(case: Case, passes: str, arrays: Any, cotangents: Any) -> Work:
  """Counts the work of a call; results are as large as their cotangents, gradients as arrays."""
  inputs, results = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (arrays, cotangents))
  gradients = sum(x.nbytes for x in arrays if jnp.issubdtype(x.dtype, jnp.floating))
  if passes == "forward":
    return Work(case.flops, inputs + results, case.tokens)
  # The backward pass reads the inputs again and the cotangents, and writes the gradients.
  nbytes = (inputs + results) + (inputs + results + gradients)
  return Work(case.flops * (1 + case.backward), nbytes, case.tokens)


def time_and_record(
  benchmark: Any, run: Callable[[], Any], work: Work, facts: dict[str, Any]
) -> None:
  """Times a call, compiled and synchronised, and writes rates and facts into extra_info.

  Args:
    benchmark: Fixture of pytest-benchmark.
    run: Function to time.
    work: Work of one call.
    facts: Further entries of extra_info.
  """

  def synchronised():
    return jax.block_until_ready(run())

  synchronised()  # compiles
  synchronised()  # a training step compiles again, for the layout of the state that it returned
  seconds = _seconds(synchronised)
  rounds = min(max(int(_BUDGET / seconds), _FEWEST), _MOST)
  benchmark.pedantic(synchronised, rounds=rounds, warmup_rounds=1)
  counts = {"flops": work.flops, "bytes": work.nbytes, "tokens": work.tokens}
  benchmark.extra_info |= {"device": jax.devices()[0].device_kind, **facts, **counts}
  if benchmark.stats is None:  # --benchmark-disable: only validated
    return
  median = benchmark.stats.stats.median
  benchmark.extra_info |= {f"{name}_per_second": n / median for name, n in counts.items()}


def reduction(full: dict[str, Any], dims: dict[str, Any]) -> str:
  """Describes how a case is smaller than the real one, e.g. "T 4096 -> 512"; "" if it is not."""
  changed = (f"{k} {full[k]} -> {size}" for k, size in dims.items() if size != full[k])
  return ", ".join(changed)


def _text(dims: dict[str, Any]) -> str:
  return " ".join(f"{name}={size}" for name, size in dims.items())


def _mode(case: Case) -> str:
  if "pallas" not in case.implementations:
    return ", no kernel"
  return ", compiled" if implementation() == "pallas" else ", interpreted"


@functools.cache
def _validated(make_case, model, dtype, **options):
  """Validates once for both passes."""
  case = make_case(model, "check", dtype, **options)
  return validation.validate(case), case


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  run()
  return max(time.perf_counter() - start, 1e-9)
