"""Changes that make a training run fit; `plan` tries them, and `train` suggests them."""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax

from ll3m.core import sharding, tpu_specs
from ll3m.models.transformer import REMAT_POLICIES
from ll3m.planning.compile_attempt import needed_bytes
from ll3m.planning.program_plan import Plan
from ll3m.planning.training_plan import TrainingJob
from ll3m.training.train_state import StatePlan, bytes_per_device

_NOTHING = (
  "full rematerialisation, smaller micro-steps and more fsdp are not enough: use more chips, or "
  "chips with more memory"
)
# jax's messages about exhausted memory, at compile time and at run time.
_EXHAUSTED = re.compile("RESOURCE_EXHAUSTED|Out of memory")


def advise(job: TrainingJob, plan: Plan, try_job: Callable[[TrainingJob], Plan]) -> str:
  """Returns a sentence with the cheapest change that makes a job fit, or that none was found.

  Args:
    job: Job that does not fit.
    plan: Plan of the job.
    try_job: Function that plans a job.
  """
  state = plan.bytes_per_chip["parameters"] + plan.bytes_per_chip["optimizer"]
  for text, changed in _changes(job, state_fits=state < plan.hbm_bytes):
    if try_job(changed).fits:
      return f"it fits with {text}"
  return _NOTHING


@contextlib.contextmanager
def advising(job: TrainingJob, state: StatePlan) -> Iterator[None]:
  """Reports the memory that a job needs, and changes that need less, if memory runs out inside.

  Args:
    job: Job that is compiled and run.
    state: Plan of the parameters and optimizer state on the devices.

  Raises:
    MemoryError: Memory ran out.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not _EXHAUSTED.search(str(error)):
      raise
    held, needed = bytes_per_device(state.state), needed_bytes(error)
    chip = tpu_specs.of_device(job.devices[0])
    changes = _changes(job, state_fits=chip is None or held < chip.hbm_bytes)
    # Among the smaller micro-steps, only the first: the flags for even smaller ones are the same.
    texts = [text for text, changed in changes if 2 * changed.rows >= job.rows]
    raise MemoryError(
      f"the run does not fit in device memory: parameters and optimizer need "
      f"{held / tpu_specs.GIB:.2f} GiB per device"
      + (f", the training step {needed / tpu_specs.GIB:.2f} GiB" if needed else "")
      + "; "
      + (f"to reduce this, use {', or '.join(texts)} (ll3m.plan tries them)" if texts else _NOTHING)
      + f"; {str(error).splitlines()[0]}"
    ) from error


def _changes(job: TrainingJob, *, state_fits: bool) -> Iterator[tuple[str, TrainingJob]]:
  """Yields changes that need less memory, with their flags, from the cheapest in time."""
  if state_fits:
    yield from _less_activations(job)
  yield from _less_state(job)


def _less_activations(job: TrainingJob) -> Iterator[tuple[str, TrainingJob]]:
  """Yields changes that store fewer activations, with the same result, cheapest in time first."""
  policies = list(REMAT_POLICIES)  # each stores less than the one before
  for remat in policies[policies.index(job.options.remat) + 1 :]:
    yield f"`remat`={remat}", job.replace(options={"remat": remat})
  least = job.replace(options={"remat": policies[-1]})
  mesh = sharding.make_mesh(job.options.mesh_dim, job.devices)
  unit = mesh.shape["dp"] * mesh.shape["fsdp"]
  factor = 2
  while job.rows % factor == 0 and job.rows // factor % unit == 0:
    rows, steps = job.rows // factor, job.steps * factor
    yield (
      f"`remat`={policies[-1]} `train_dataset.seqio_dataset.batch_size`={rows} "
      f"`optimizer.accumulate_gradient_steps`={steps}",
      least.replace(rows=rows, steps=steps),
    )
    factor *= 2


def _less_state(job: TrainingJob) -> Iterator[tuple[str, TrainingJob]]:
  """Yields meshes that shard parameters and optimizer state over more devices."""
  mesh = sharding.make_mesh(job.options.mesh_dim, job.devices)
  dp, fsdp, mp = mesh.shape.values()
  slices = sharding.num_slices(job.devices)
  while dp % 2 == 0 and (dp // 2) % slices == 0:
    dp, fsdp = dp // 2, fsdp * 2
    mesh_dim = f"{dp},{fsdp},{mp}"
    for remat in dict.fromkeys((job.options.remat, list(REMAT_POLICIES)[-1])):
      yield (
        f"`mesh_dim`={mesh_dim} `remat`={remat}",
        job.replace(options={"mesh_dim": mesh_dim, "remat": remat}),
      )
