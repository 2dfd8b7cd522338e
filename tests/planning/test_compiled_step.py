"""The training step on a mesh, as the TPU compiler compiles it: kernels, gathers and memory.

It is compiled in a separate process, because libtpu, once loaded, changes the devices that jax
sees. Results are cached between runs.
"""

import json
import os
import subprocess
import sys

import pytest

# Sizes that occur nowhere else, so that the dimensions of an array identify it.
LENGTH, ROWS, VOCABULARY = 384, 4, 4224

COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from ll3m import families
from ll3m.core import sharding
from ll3m.planning import costs, hlo, topology
from ll3m.training.sharded_batches import batch_shapes
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.program import make_program
from ll3m.training.config import TrainOptions

kind, length, rows, vocabulary = sys.argv[1], *map(int, sys.argv[2:])
config = families.get_preset("mistral_7b").config.replace(
  vocab_size=vocabulary, d_model=256, d_ff=640, num_layers=3, num_heads=4, num_kv_heads=2,
  head_dim=64, sliding_window=100, max_positions=length,
)
mesh = sharding.make_mesh("1,2,2", topology.devices("v5e:2x2"))
options = TrainOptions(dtype="bf16", param_dtype="bf16", remat="full")
program = make_program(options, OptimizerConfig(), config, mesh)
batch = batch_shapes(mesh, 1, rows, length)
if kind == "step":
  lowered = program.step.lower(program.plan.state, batch)
else:  # the same model, with the logits that a training step must not hold
  def logits(params, tokens):
    return program.model.logits(params, program.model.hidden(params, tokens))
  tokens = batch_shapes(mesh, rows, length).inputs
  lowered = jax.jit(logits).lower(program.plan.params, tokens)
compiled = lowered.compile()
module = hlo.read(compiled)
print(json.dumps({
  "kernels": costs.kernels(module),
  "gathered": [
    [list(a.shape) for a in i.arrays]
    for _, i in module.instructions() if i.opcode.startswith("all-gather")
  ],
  "shapes": sorted({a.shape for _, i in module.instructions() for a in i.arrays}),
  "aliased": compiled.memory_analysis().alias_size_in_bytes,
  "state": sum(
    x.sharding.shard_shape(x.shape) == () and 4 or
    jnp.dtype(x.dtype).itemsize * int(jnp.prod(jnp.array(x.sharding.shard_shape(x.shape))))
    for x in jax.tree.leaves(program.plan.state)
  ),
}))
"""


@pytest.fixture(scope="module")
def compiled(kept):
  """Returns a function from the kind of a program to facts about it, compiled."""
  return lambda kind: kept.get((COMPILE, kind, LENGTH, ROWS, VOCABULARY), lambda: facts(kind))


def facts(kind: str) -> dict:
  done = subprocess.run(
    [sys.executable, "-c", COMPILE, kind, *map(str, (LENGTH, ROWS, VOCABULARY))],
    env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"} | _python_path(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def _python_path() -> dict[str, str]:
  return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


def has_logits(shapes: list[list[int]]) -> bool:
  """Returns whether an array has tokens by vocabulary: a device's rows or one row, V or V / 2."""
  tokens = {LENGTH, ROWS * LENGTH, ROWS // 2 * LENGTH}
  return any(tokens & set(shape) and {VOCABULARY, VOCABULARY // 2} & set(shape) for shape in shapes)


@pytest.fixture(scope="module")
def step(compiled):
  return compiled("step")


def test_the_program_has_all_kernels(step):
  assert set(step["kernels"]) == {
    "flash_attention_forward", "flash_attention_backward", "norm_forward", "norm_backward",
    "rotary_embedding", "rotary_embedding_inverse",
  }  # fmt: skip


def test_only_parameters_are_gathered(step):
  """Keys, values and other activations are not: no gathered array has a dimension of T."""
  assert step["gathered"]
  for shapes in step["gathered"]:
    for shape in shapes:
      assert not {LENGTH, ROWS * LENGTH, ROWS // 2 * LENGTH} & set(shape), shape


def test_the_program_holds_no_logits(step, compiled):
  assert not has_logits(step["shapes"])
  assert has_logits(compiled("logits")["shapes"])  # the check detects logits


def test_the_state_is_donated(step):
  """The new state uses the memory of the old one, up to the padding of tiles."""
  assert step["aliased"] >= step["state"]
