"""Plans a run on TPUs, without needing any: `python -m ll3m.plan --topology=v5e:8x8 ...`.

Takes the flags of `ll3m.train` and compiles the training step with the TPU compiler of the package
libtpu. Reports whether the step fits into memory, its communication, and a bound on its speed.
Reads only the model's configuration, neither data nor weights.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax

from ll3m.core import flags
from ll3m.core.options import option, require
from ll3m.data import gin_settings
from ll3m.hf.model_source import open_source
from ll3m.planning import decoding_plan, plan_table, remedies, topology, training_plan
from ll3m.planning.program_plan import Plan
from ll3m.training.config import FALLBACKS, SHORT, TrainOptions, without_effect
from ll3m.training.config import FLAG_GROUPS as TRAIN_GROUPS
from ll3m.training.model_choice import check_length, choose_model


@dataclasses.dataclass(frozen=True)
class PlanOptions(TrainOptions):
  """The flags of `ll3m.train` and of the plan itself."""

  topology: str | None = option(
    None, "TPU generation and chips along each dimension, e.g. v5e:8x8 or v5p:4x4x4."
  )
  num_slices: int = option(
    1, "Number of slices of this topology, connected by the data-center network."
  )
  mode: str = option(
    "train",
    "Plan a training step, or the decoding of one token for batch_size texts of "
    "task_feature_lengths.",
    choices=("train", "decode"),
  )
  search_batch: bool = option(False, "Also search for the largest batch_size that fits.")
  json: bool = option(False, "Print one JSON object instead of a table.")

  def __post_init__(self):
    super().__post_init__()
    require(self, "topology")


FLAG_GROUPS = TRAIN_GROUPS | {"": PlanOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Plans a run; see `flags.call` for `argv` and the returned exit code."""
  platforms = jax.config.jax_platforms
  # Only the compiler is needed: keep jax from initialising an accelerator, unless it already has.
  jax.config.update("jax_platforms", "cpu")
  try:
    return flags.call(_plan, FLAG_GROUPS, argv, doc=__doc__, fallbacks=FALLBACKS, short=SHORT)
  finally:
    jax.config.update("jax_platforms", platforms)


def _plan(given: flags.Flags) -> None:
  wanted, job = given[""], read_job(given)
  make_plan = training_plan.plan_training if wanted.mode == "train" else decoding_plan.plan_decoding

  def try_job(changed: training_plan.TrainingJob) -> Plan:
    tried = make_plan(changed)
    print(
      f"tried batch_size={changed.rows} x {changed.steps}, mesh {changed.options.mesh_dim}, remat "
      f"{changed.options.remat}: {'fits' if tried.fits else 'does not fit'}",
      file=sys.stderr,
    )
    return tried

  with given.within("train_dataset.seqio_dataset"):
    plan = make_plan(job)
  if not plan.fits and wanted.mode == "train":
    plan = dataclasses.replace(plan, advice=given.spell(remedies.advise(job, plan, try_job)))
  if wanted.search_batch:
    plan = dataclasses.replace(plan, largest_batch=training_plan.largest_batch(job, try_job))
  if wanted.json:
    print(json.dumps(plan.to_json()))
    return
  print(plan_table.table(plan))
  if plan.fits and wanted.mode == "train":
    print("to run it   python -m ll3m.train with the same flags, without those of ll3m.plan")


def read_job(given: flags.Flags) -> training_plan.TrainingJob:
  """Checks the flags of training that do not concern data or weights.

  Raises:
    ValueError: A flag is invalid.
  """
  options, optimizer, dataset = given[""], given["optimizer"], given["train_dataset"]
  given.refuse(without_effect(options, has_eval_data=given.given("eval_dataset.data")))
  gin_settings.apply(options, given["tokenizer"])
  rows = dataset.seqio_dataset
  source = None
  if not options.load_model_config and options.load_checkpoint:
    kind, _, path = options.load_checkpoint.partition("::")
    place = options.load_checkpoint if kind == "hf" else path
    source = open_source(place, verify=False)  # only the configuration is read
  preset = choose_model(options, source)
  with given.within("train_dataset.seqio_dataset"):
    check_length(rows.length, preset.config)
  return training_plan.TrainingJob(
    options=options,
    optimizer=optimizer,
    preset=preset,
    devices=topology.devices(options.topology, options.num_slices),
    rows=rows.batch_size,
    length=rows.length,
  )


if __name__ == "__main__":
  sys.exit(main())
