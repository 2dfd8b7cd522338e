"""Devices with too little memory: errors list what a run takes, and options that need less."""

import os
import subprocess
import sys

GIB = 2**30

# The error is a real one, raised by the TPU's compiler. The script runs in a process of its own,
# because libtpu, once loaded, changes what jax sees.
COMPILE = """
from ll3m import families
from ll3m.core import sharding
from ll3m.planning import remedies, topology
from ll3m.planning.training_plan import TrainingJob
from ll3m.training.sharded_batches import batch_shapes
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.program import make_program
from ll3m.training.config import TrainOptions

family, config = families.get_preset("llama2_7b")
job = TrainingJob(
  options=TrainOptions(dtype="bf16", param_dtype="bf16", mesh_dim="4,1,1"),
  optimizer=OptimizerConfig(),
  preset=families.Preset(family, config.replace(num_layers=2)),
  devices=topology.devices("v5e:2x2"),
  rows=1024,
  length=256,
)
mesh = sharding.make_mesh(job.options.mesh_dim, job.devices)
program = make_program(job.options, job.optimizer, job.preset.config, mesh)
with remedies.advising(job, program.plan):
  program.step.lower(
    program.plan.state, batch_shapes(mesh, job.steps, job.rows, job.length)
  ).compile()
"""


def test_step_that_the_compiler_refuses_is_explained():
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 1, done.stderr
  said = done.stderr.splitlines()[-1]
  layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
  held = 3 * 2 * (2 * layer + 2 * 32000 * 4096 + 4096)  # bfloat16, with two moments
  assert said.startswith("MemoryError: the run does not fit in")
  assert (
    f"parameters and optimizer need {held / GIB:.2f} GiB per device, the training step " in said
  )
  wanted = ", or ".join(
    [
      "`remat`=dots",
      "`remat`=attention",
      "`remat`=full",
      "`remat`=full `train_dataset.seqio_dataset.batch_size`=512 "
      "`optimizer.accumulate_gradient_steps`=2",
      "`mesh_dim`=2,2,1 `remat`=nothing",
      "`mesh_dim`=2,2,1 `remat`=full",
      "`mesh_dim`=1,4,1 `remat`=nothing",
      "`mesh_dim`=1,4,1 `remat`=full",
    ]
  )
  assert f" {wanted} (ll3m.plan tries them); RESOURCE_EXHAUSTED: " in said


def test_run_without_memory_for_its_parameters_is_explained(start, arguments, tmp_path):
  """The run requests 128 GB at once in 32 GiB of address space; the memory is never touched."""
  wide = [flag.replace("d_ff=24", "d_ff=1000000000") for flag in arguments]
  assert wide != arguments
  with start(tmp_path / "run", *wide, memory_limit=32 * GIB) as job:
    assert job.end() == 1, job.said()
  said = job.said().splitlines()[-1]
  assert said.startswith("error: the run does not fit in")
  assert " --remat=dots, or " in said
  assert said.endswith("RESOURCE_EXHAUSTED: Out of memory allocating 128000000000 bytes.")
