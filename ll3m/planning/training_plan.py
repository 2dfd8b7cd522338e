"""Plans of training: the same step that `ll3m.train` runs, compiled for another machine."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from ll3m import families
from ll3m.core import sharding, tpu_specs
from ll3m.planning.compile_attempt import compile_program
from ll3m.planning.program_plan import Plan, Work
from ll3m.training.config import TrainOptions
from ll3m.training.metrics import flops_per_token, mean_keys
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.program import make_program
from ll3m.training.run import Run
from ll3m.training.sharded_batches import batch_shapes
from ll3m.training.train_state import bytes_per_device


@dataclasses.dataclass(frozen=True)
class TrainingJob:
  """The parts of a training run that determine its memory and time on a machine.

  Attributes:
    options: Options of the command; only those of the model and the loss are used.
    optimizer: Options of the optimizer.
    preset: The model.
    devices: Devices of the machine.
    rows: B, sequences per micro-step, over all devices.
    length: T, tokens per row.
  """

  options: TrainOptions
  optimizer: OptimizerConfig
  preset: families.Preset
  devices: Sequence[jax.Device]
  rows: int
  length: int

  @property
  def steps(self) -> int:
    """A, micro-steps per optimizer step."""
    return self.optimizer.accumulate_gradient_steps

  def replace(self, *, options: dict | None = None, steps: int | None = None, **fields):
    """Returns the job with other options, micro-steps or fields."""
    job = dataclasses.replace(self, **fields)
    if options:
      job = dataclasses.replace(job, options=dataclasses.replace(job.options, **options))
    if steps is not None:
      optimizer = dataclasses.replace(job.optimizer, accumulate_gradient_steps=steps)
      job = dataclasses.replace(job, optimizer=optimizer)
    return job


def job_of(run: Run) -> TrainingJob:
  """Returns the job of a run."""
  return TrainingJob(
    options=run.options,
    optimizer=run.optimizer,
    preset=families.Preset(run.family, run.config),
    devices=list(run.mesh.devices.flat),
    rows=run.train_dataset.seqio_dataset.batch_size,
    length=run.length,
  )


def plan_training(job: TrainingJob) -> Plan:
  """Compiles the training step and returns its costs.

  Raises:
    ValueError: The mesh does not fit the devices, or the batch does not fit the mesh.
  """
  config = job.preset.config
  mesh = sharding.make_mesh(job.options.mesh_dim, job.devices)
  sharding.local_rows(mesh, job.rows)
  program = make_program(job.options, job.optimizer, config, mesh)
  shapes = batch_shapes(mesh, job.steps, job.rows, job.length)
  attempt = compile_program(program.step.lower(program.plan.state, shapes))
  chip = tpu_specs.of_device(job.devices[0])
  parameters = bytes_per_device(program.plan.params)
  optimizer = bytes_per_device(program.plan.state.opt_state)
  tokens = job.rows * job.steps * job.length
  slices = sharding.num_slices(job.devices)
  plan = Plan(
    subject=(
      ("model", f"{job.preset.family.name}, {program.plan.count():,} parameters"),
      ("machine", machine(job.devices)),
      ("mesh", ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())),
      (
        "step",
        f"{job.rows} x {job.steps} sequences of {job.length} tokens = {tokens:,} tokens",
      ),
      (
        "remat",
        f"{job.options.remat}; parameters {job.options.param_dtype}, activations "
        f"{job.options.dtype}",
      ),
      *(("not split", text) for text in sharding.unsplit(program.plan.params, mesh)),
    ),
    bytes_per_chip={
      "parameters": parameters,
      "optimizer": optimizer,
      "temporaries": max(0, attempt.used_bytes - parameters - optimizer),
      "headroom": chip.hbm_bytes - attempt.used_bytes,
    },
    hbm_bytes=chip.hbm_bytes,
    kernels=(),
    device_kind=job.devices[0].device_kind,
    collectives=(),
    compile_seconds=attempt.seconds,
    flops=None,
    step_seconds=None,
    tokens_per_second=None,
    mfu=None,
  )
  if attempt.module is None:
    return plan
  keys = [mean_keys(kind.window, job.length) for kind in config.layer_kinds]
  work = Work.of(attempt.module, mesh, sum(keys) / len(keys))
  seconds = work.seconds(chip, num_slices=slices)
  bound = max(seconds.values())
  possible = chip.peak_flops * len(job.devices) * bound
  return dataclasses.replace(
    plan,
    kernels=work.kernels,
    collectives=work.collectives,
    flops=work.flops * len(job.devices),
    step_seconds=seconds,
    tokens_per_second=tokens / bound,
    mfu=tokens * flops_per_token(config, job.length) / possible,
  )


def machine(devices: Sequence[jax.Device]) -> str:
  """Returns a description of a machine."""
  slices = sharding.num_slices(devices)
  chips_of = {(tuple(d.coords), getattr(d, "slice_index", 0)) for d in devices}
  text = f"{len(devices)} devices of {devices[0].device_kind} on {len(chips_of)} chips"
  return text if slices == 1 else f"{text}, {slices} slices"


def largest_batch(job: TrainingJob, try_job: Callable[[TrainingJob], Plan]) -> int | None:
  """Searches for the largest micro-step that fits, in sequences; None if the smallest does not.

  Args:
    job: Job to change; the search starts at its rows.
    try_job: Function that plans a job.
  """
  mesh = sharding.make_mesh(job.options.mesh_dim, job.devices)
  unit = mesh.shape["dp"] * mesh.shape["fsdp"]

  def fits(count: int) -> bool:
    return try_job(job.replace(rows=count * unit)).fits

  good, bad = 0, None
  count = max(1, job.rows // unit)
  while bad is None or bad - good > 1:
    if fits(count):
      good = count
    else:
      bad = count
    # Doubles until a count does not fit, then bisects.
    count = 2 * good if bad is None else (good + bad) // 2
  return good * unit or None
