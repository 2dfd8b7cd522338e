"""Compilation of the kernels by the real TPU compiler, which libtpu contains; it needs no TPU.

The compiler runs in a separate process, because libtpu changes jax's devices once it is loaded.
Results are cached between runs. `make tpu-check` compiles the whole matrix.
"""

import json
import subprocess
import sys

import pytest

from benchmarks import tpu_cases
from ll3m_kernels.dispatch import GENERATIONS
from tests.kept import KERNEL_SOURCES

COMPILE = """
import json, sys
from benchmarks import tpu_cases
from ll3m_kernels.tpu_compiler import compile_for, vmem_bytes
failures = []
for case in tpu_cases.slice_of_cases():
  name = f"{case.kernel} {case.name} {case.dtype}"
  try:
    memory = vmem_bytes(compile_for(sys.argv[1], case.function, *case.arrays))
  except Exception as error:
    failures.append(f"{name}: {type(error).__name__}: {error}")
  else:
    print(json.dumps([name, memory]), flush=True)
if failures:
  sys.exit("\\n".join(failures))
"""
SCALING = """
import jax, jax.numpy as jnp, json
from benchmarks import shapes, tpu_cases
from ll3m_kernels.tpu_compiler import compile_for
found = {}
for length in (16384, 32768):
  case = tpu_cases.attention("tiny_llama_1b", shapes.ATTENTION["tiny_llama_1b"], length, "bf16")
  compiled = compile_for("v4", case.function, *case.arrays)  # the quickest to compile for
  found[length] = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps(found))
"""

HEAD = """
import json
from benchmarks import shapes, tpu_cases
from ll3m_kernels.tpu_compiler import compile_for
shape = shapes.HeadShape(features=2048, vocab_size=262_144, layout="vd", has_bias=False)
case = tpu_cases.head("gemma3", shape, 8192, "bf16")
compiled = compile_for("v5e", case.function, *case.arrays)
print(json.dumps(compiled.memory_analysis().temp_size_in_bytes))
"""


@pytest.fixture
def run(kept):
  """Returns a function that runs a program and returns the lines that it prints."""

  def compiled(code: str, *arguments: str) -> list:
    done = subprocess.run(
      [sys.executable, "-c", code, *arguments],
      env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]

  return lambda *program: kept.get(program, lambda: compiled(*program), KERNEL_SOURCES)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_kind_of_kernel_compiles(run, generation):
  results = dict(run(COMPILE, generation))
  assert len(results) == len(list(tpu_cases.slice_of_cases()))
  for name, memory in results.items():
    assert memory, f"{name}: no kernel in the compiled module"
    assert max(memory.values()) <= GENERATIONS[generation].vmem_bytes


def test_memory_of_attention_is_linear_in_the_length(run):
  (found,) = run(SCALING)
  # Twice the tokens take twice the memory; an array of T x S would take four times as much. (Short
  # sequences do not show this, because the compiler keeps their arrays in vector memory.)
  assert 0 < found["32768"] <= 2.1 * found["16384"]


def test_the_loss_has_no_logits_in_memory(run):
  (found,) = run(HEAD)
  # Both passes take at most an eighth of the memory of Gemma's float32 logits, with V = 256,000.
  assert 0 < found <= 8192 * 256_000 * 4 / 8
