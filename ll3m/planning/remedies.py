"""What would make a training run fit: changes that were tried, not guessed."""

from collections.abc import Callable, Iterator

from ll3m.core import sharding
from ll3m.models.transformer import REMAT_POLICIES
from ll3m.planning.plan import Plan
from ll3m.planning.training import TrainingJob


def advise(job: TrainingJob, plan: Plan, try_job: Callable[[TrainingJob], Plan]) -> str:
  """Returns the cheapest change with which a job fits, or says that none was found.

  Args:
    job: that does not fit.
    plan: what was found out about it.
    try_job: plans a job.
  """
  state = plan.bytes_per_chip["parameters"] + plan.bytes_per_chip["optimizer"]
  if state < plan.hbm_bytes:
    for text, changed in _less_activations(job):
      if try_job(changed).fits:
        return f"it fits with {text}"
  for text, changed in _less_state(job):
    if try_job(changed).fits:
      return f"it fits with {text}"
  return (
    "none of full rematerialisation, smaller micro-steps and more fsdp makes it fit: it needs more "
    "chips, or chips with more memory"
  )


def _less_activations(job: TrainingJob) -> Iterator[tuple[str, TrainingJob]]:
  """Yields changes that keep the step's result, from the cheapest in time."""
  policies = list(REMAT_POLICIES)  # ordered: each keeps less than the one before
  for remat in policies[policies.index(job.options.remat) + 1 :]:
    yield f"--remat={remat}", job.replace(options={"remat": remat})
  least = job.replace(options={"remat": policies[-1]})
  mesh = sharding.make_mesh(job.options.mesh_dim, job.devices)
  unit = mesh.shape["dp"] * mesh.shape["fsdp"]
  factor = 2
  while job.rows % factor == 0 and job.rows // factor % unit == 0:
    rows, steps = job.rows // factor, job.steps * factor
    yield (
      f"--remat={policies[-1]} --train_dataset.seqio_dataset.batch_size={rows} "
      f"--optimizer.accumulate_gradient_steps={steps}",
      least.replace(rows=rows, steps=steps),
    )
    factor *= 2


def _less_state(job: TrainingJob) -> Iterator[tuple[str, TrainingJob]]:
  """Yields meshes that split parameters and optimizer over more devices."""
  mesh = sharding.make_mesh(job.options.mesh_dim, job.devices)
  dp, fsdp, mp = mesh.shape.values()
  slices = sharding.num_slices(job.devices)
  while dp % 2 == 0 and (dp // 2) % slices == 0:
    dp, fsdp = dp // 2, fsdp * 2
    mesh_dim = f"{dp},{fsdp},{mp}"
    for remat in dict.fromkeys((job.options.remat, list(REMAT_POLICIES)[-1])):
      yield (
        f"--mesh_dim={mesh_dim} --remat={remat}",
        job.replace(options={"mesh_dim": mesh_dim, "remat": remat}),
      )
