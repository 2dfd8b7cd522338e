"""The process in which `estimates.estimate` compiles; libtpu writes the profiles to its folder.

The argument is a task as JSON. The output is a JSON list with an entry per kernel: the prefix of
the names of its profiles, its name, the number of cores that share it, and whether it follows data.
"""

import importlib
import json
import sys
from typing import Any

import jax

from benchmarks.tuning.data_dependence import follows_data, kernel_calls
from ll3m_kernels import dispatch
from ll3m_kernels.tpu_compiler import compile_for


def main() -> None:
  """Compiles the task's kernels, or its whole program."""
  task = json.loads(sys.argv[1])
  module, _, name = task["builder"].partition(":")
  generation, builder = task["generation"], getattr(importlib.import_module(module), name)
  cores = dispatch.GENERATIONS[generation].num_cores
  with dispatch.target(generation):
    function, arrays = builder(**task["arguments"])
    if task["whole_program"]:
      compile_for(generation, function, *arrays)
      found = [("", "program", cores, False)]
    else:
      calls = list(kernel_calls(jax.make_jaxpr(function)(*arrays).jaxpr))
      found = [_compile(generation, cores, *numbered) for numbered in enumerate(calls)]
  print(json.dumps(found))


def _compile(generation: str, cores: int, number: int, call: Any) -> tuple[str, str, int, bool]:
  """Compiles a kernel alone."""

  def function(*operands):
    return call.primitive.bind(*operands, **call.params)

  # XLA names the operation after the function; several kernels may have the same name.
  function.__name__ = function.__qualname__ = label = f"kernel_{number}_"
  operands = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in call.invars]
  # Operands that are overwritten would be copied first if they were not donated, perhaps into the
  # vector memory that the kernel needs.
  donated = tuple(operand for operand, _ in call.params["input_output_aliases"])
  compile_for(generation, function, *operands, row_major=True, donated=donated)
  # The simulation covers one core's share of the work.
  grid = call.params["grid_mapping"].grid
  semantics = getattr(call.params["compiler_params"], "dimension_semantics", None) or ()
  splits = any(size > 1 and s == "parallel" for size, s in zip(grid, semantics, strict=False))
  return label, _name(call), cores if splits else 1, follows_data(call)


def _name(call: Any) -> str:
  return call.params.get("name") or call.params["jaxpr"].debug_info.func_name


if __name__ == "__main__":
  main()
