"""Plans a run on TPUs that are not here: `python -m ll3m.plan --topology=v5e:8x8 ...`.

Takes the flags of `ll3m.train` and compiles that training step with the TPU's own compiler, which
the package libtpu brings: whether it fits, what it sends, how fast it could be. Nothing is read but
the model's configuration; no data, no weights, no TPU.
"""

import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: the compiler is wanted, not a chip that is here

from ll3m.core import flags
from ll3m.data import gin_settings
from ll3m.data.config import refuse_unread
from ll3m.hf.sources import open_source
from ll3m.planning import decoding, remedies, report, topology, training
from ll3m.planning.plan import Plan
from ll3m.training.optimizer import refuse_unchosen
from ll3m.training.options import FLAG_GROUPS
from ll3m.training.setup import check_length, choose_model


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """Flags beside those of `ll3m.train`."""

  topology: str | None = flags.option(
    None, "The machine: generation and chips along each dimension, e.g. v5e:8x8 or v5p:4x4x4."
  )
  num_slices: int = flags.option(1, "How many such machines, joined by the data center's network.")
  mode: str = flags.option(
    "train",
    "Plan training, or the decoding of one token for batch_size texts of task_feature_lengths.",
    choices=("train", "decode"),
  )
  search_batch: bool = flags.option(False, "Also search for the largest batch_size that fits.")
  json: bool = flags.option(False, "Print one JSON object instead of a table.")


for prefix, options_class in FLAG_GROUPS.items():
  flags.define(prefix, options_class)
flags.define("", PlanOptions)


def main() -> None:
  """Plans."""
  wanted = flags.read("", PlanOptions)
  flags.require(wanted.topology, "topology")
  job = read_job(wanted)
  make_plan = training.plan_training if wanted.mode == "train" else decoding.plan_decoding

  def try_job(changed: training.TrainingJob) -> Plan:
    tried = make_plan(changed)
    print(
      f"tried batch_size={changed.rows} x {changed.steps}, mesh {changed.options.mesh_dim}, remat "
      f"{changed.options.remat}: {'fits' if tried.fits else 'does not fit'}",
      file=sys.stderr,
    )
    return tried

  plan = make_plan(job)
  if not plan.fits and wanted.mode == "train":
    plan = dataclasses.replace(plan, advice=remedies.advise(job, plan, try_job))
  if wanted.search_batch:
    plan = dataclasses.replace(plan, largest_batch=training.largest_batch(job, try_job))
  print(json.dumps(plan.to_json()) if wanted.json else report.table(plan))


def read_job(wanted: PlanOptions) -> training.TrainingJob:
  """Reads and checks the flags of training, but for what they would read from disk.

  Raises:
    ValueError: what is wrong, in one sentence.
  """
  groups = {prefix: flags.read(prefix, options) for prefix, options in FLAG_GROUPS.items()}
  options, optimizer, dataset = (groups[prefix] for prefix in ("", "optimizer", "train_dataset"))
  refuse_unchosen(optimizer, "optimizer", options.param_dtype)
  refuse_unread(dataset, "train_dataset")
  gin_settings.apply(options, groups["tokenizer"])
  rows = dataset.seqio_dataset
  source = None
  if not options.load_model_config and options.load_checkpoint:
    kind, _, path = options.load_checkpoint.partition("::")
    place = options.load_checkpoint if kind == "hf" else path
    source = open_source(place, verify=False)  # of its files, only the configuration is read
  preset = choose_model(options, source)
  check_length(rows.length, preset.config)
  return training.TrainingJob(
    options=options,
    optimizer=optimizer,
    preset=preset,
    devices=topology.devices(wanted.topology, wanted.num_slices),
    rows=rows.batch_size,
    length=rows.length,
  )


if __name__ == "__main__":
  flags.run(main)
