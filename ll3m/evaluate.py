"""Measures a model's held-out loss: `python -m ll3m.evaluate --checkpoint=PATH`."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import jax
from tqdm import tqdm

from ll3m.core import distributed, flags, sharding
from ll3m.core.dtypes import DTYPES
from ll3m.core.options import option, require
from ll3m.core.progress import aligned
from ll3m.data import gin_settings
from ll3m.data.batching import open_dataset
from ll3m.data.config import (
  DatasetConfig,
  GinConfig,
  StrictConfig,
  TokenizerConfig,
  short_names,
)
from ll3m.data.dataset_spec import resolve
from ll3m.data.tokenizer import load_tokenizer
from ll3m.hf.model_source import open_source
from ll3m.training.evaluation import evaluate
from ll3m.training.logger import say
from ll3m.training.model_choice import ModelOptions, build_model, check_length, choose_model
from ll3m.training.sharded_batches import batch_shapes, in_step
from ll3m.training.step import make_eval_step

_STEPS = 100  # batches of data of unknown size


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ModelOptions, GinConfig, StrictConfig):
  """Flags of the command, without those of the data, the tokenizer and the processes."""

  checkpoint: str | None = option(
    None, "Converted folder, output_dir of a run, step folder of a run, or hf::DIR."
  )
  eval_steps: int | None = option(
    None,
    "Maximum number of batches; fewer if the data ends earlier. Default: all of files and "
    "downloaded datasets, 100 of mixtures and streams, whose size is unknown.",
  )
  eval_fraction: float = option(
    0.0,
    "Fraction of the rows that training with the same value held out: only these are read. 0 reads "
    "all rows.",
  )
  data_dir: str | None = option(
    None, "Folder of the text shards, local or gs://; $LL3M_DATA_DIR or ./data by default."
  )
  seed: int = option(42, "Random seed for data order, if the data is shuffled.")
  json: bool = option(False, "Print the result as one line of JSON.")

  def __post_init__(self):
    require(self, "checkpoint")
    if self.eval_steps is not None and self.eval_steps < 1:
      raise ValueError(f"`eval_steps` must be at least 1, got {self.eval_steps}")


SHORT = short_names("eval_dataset")
FLAG_GROUPS = {
  "": EvaluateOptions,
  "tokenizer": TokenizerConfig,
  "eval_dataset": DatasetConfig,
  "jax_distributed": distributed.DistributedConfig,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Evaluates a model on one or several hosts; process 0 prints the result.

  See `flags.call` for `argv` and the returned exit code.
  """
  return flags.call(_evaluate, FLAG_GROUPS, argv, doc=__doc__, short=SHORT)


def _evaluate(given: flags.Flags) -> None:
  """Performs all checks that need no weights, loads the weights, and prints the loss.

  Raises:
    ValueError: The flags, the model's files or the data are invalid.
  """
  options, dataset = given[""], given["eval_dataset"]
  with given.within("eval_dataset"):
    data = resolve(
      dataset,
      is_evaluation=True,
      seed=options.seed,
      strict=options.strict,
      data_dir=options.data_dir,
      eval_fraction=options.eval_fraction,
      workers=os.cpu_count() or 1,
    )
  if not data.is_rows:
    given.refuse({"strict": "on mixtures"})
  if options.eval_steps is None and data.is_countable:
    data = data.counted()
  source = open_source(options.checkpoint, verify=options.verify)
  family, config = choose_model(options, source)
  with given.within("eval_dataset.seqio_dataset"):
    check_length(dataset.seqio_dataset.length, config)
  mesh = sharding.make_mesh(options.mesh_dim)
  with given.within("eval_dataset.seqio_dataset"):
    rows = sharding.local_rows(mesh, dataset.seqio_dataset.batch_size)
  tokenizer = load_tokenizer(
    gin_settings.apply(options, given["tokenizer"]),
    checkpoint_dir=source.tokenizer_dir,
    source_dir=source.source_dir,
    family=family.name,
    embedding_size=config.vocab_size,
  )
  batches = open_dataset(data, tokenizer, rows=rows)
  eval_steps = options.eval_steps or batches.num_batches or _STEPS
  model = build_model(config, mesh, dtype=options.dtype)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = source.load_params(
    dtype=DTYPES[options.dtype], shardings=sharding.parameter_shardings(shapes, mesh)
  )
  shape = (dataset.seqio_dataset.batch_size, dataset.seqio_dataset.length)
  eval_step = jax.jit(make_eval_step(model)).lower(params, batch_shapes(mesh, *shape)).compile()
  with tqdm(total=eval_steps, unit="batch", disable=None, leave=False) as bar:
    record = evaluate(
      eval_step,
      params,
      in_step(batches),
      steps=eval_steps,
      mesh=mesh,
      skipped=batches.skipped,
      on_batch=bar.update,
    )
  if skipped := batches.skipped.describe_unreported():
    say(skipped)
  if options.json:
    print(json.dumps(record))
    return
  print(
    aligned(
      [
        ("loss", f"{record['loss']:.4f} nats per token"),
        ("perplexity", f"{record['perplexity']:.3f}"),
        ("accuracy", f"{record['accuracy']:.4f}"),
        ("measured on", f"{record['targets']:,.0f} target tokens"),
        ("speed", f"{record['tokens_per_second']:,.0f} tokens/s"),
      ]
    )
  )


if __name__ == "__main__":
  sys.exit(main())
