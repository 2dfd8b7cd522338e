"""Measures a model's held-out loss: `python -m ll3m.evaluate --checkpoint=PATH`."""

import dataclasses
import json

import jax
from tqdm import tqdm

from ll3m.core import flags, processes, sharding
from ll3m.core.dtypes import DTYPES
from ll3m.data import gin_settings
from ll3m.data.batches import open_dataset
from ll3m.data.config import (
  DatasetConfig,
  GinConfig,
  StrictConfig,
  TokenizerConfig,
  refuse_strict,
  refuse_unread,
)
from ll3m.data.spec import resolve
from ll3m.data.tokenizer import load_tokenizer
from ll3m.hf.sources import open_source
from ll3m.training.evaluation import evaluate
from ll3m.training.inputs import batch_shapes, in_step
from ll3m.training.logger import say
from ll3m.training.setup import ModelOptions, build_model, check_length, choose_model
from ll3m.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ModelOptions, GinConfig, StrictConfig):
  """Flags of the command itself."""

  checkpoint: str | None = flags.option(
    None, "A converted folder, a run's output_dir, one of its step folders, or hf::DIR."
  )
  eval_steps: int = flags.option(100, "Batches at most; fewer if the data ends before.")
  data_dir: str | None = flags.option(
    None, "Folder of the text shards, local or gs://; $LL3M_DATA_DIR or ./data by default."
  )
  seed: int = flags.option(42, "Of the data's order, where it is shuffled.")
  json: bool = flags.option(False, "Print the result as one line of JSON.")

  def __post_init__(self):
    if self.eval_steps < 1:
      raise ValueError(f"--eval_steps must be at least 1, got {self.eval_steps}")


FLAG_GROUPS = {
  "": EvaluateOptions,
  "tokenizer": TokenizerConfig,
  "eval_dataset": DatasetConfig,
  "jax_distributed": processes.ProcessesConfig,
}
for prefix, options_class in FLAG_GROUPS.items():
  flags.define(prefix, options_class)


def main() -> None:
  """Evaluates, on this host alone or together with others; process 0 prints."""
  values = {group: flags.read(group, options) for group, options in FLAG_GROUPS.items()}
  flags.require(values[""].checkpoint, "checkpoint")
  with processes.joined(values["jax_distributed"], values):
    measure(values[""], values["eval_dataset"], values["tokenizer"])


def measure(
  options: EvaluateOptions, dataset: DatasetConfig, tokenizer_config: TokenizerConfig
) -> None:
  """Checks everything that can be known without weights, loads them, and prints the loss.

  Raises:
    ValueError: what is wrong with the flags, the model's files or the data.
  """
  refuse_unread(dataset, "eval_dataset")
  refuse_strict(dataset)
  data = resolve(
    dataset,
    split_default="validation",
    repeat=False,
    seed=options.seed,
    strict=options.strict,
    data_dir=options.data_dir,
    prefix="--eval_dataset.",
  )
  source = open_source(options.checkpoint, verify=options.verify)
  family, config = choose_model(options, source)
  check_length(dataset.seqio_dataset.length, config)
  mesh = sharding.make_mesh(options.mesh_dim)
  rows = sharding.local_rows(mesh, dataset.seqio_dataset.batch_size)
  tokenizer = load_tokenizer(
    gin_settings.apply(options, tokenizer_config),
    checkpoint_dir=source.tokenizer_dir,
    source_dir=source.source_dir,
    family=family.name,
    embedding_size=config.vocab_size,
  )
  batches = open_dataset(data, tokenizer, rows=rows)
  model = build_model(config, mesh, dtype=options.dtype)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = source.load_params(
    dtype=DTYPES[options.dtype], shardings=sharding.parameter_shardings(shapes, mesh)
  )
  shape = (dataset.seqio_dataset.batch_size, dataset.seqio_dataset.length)
  eval_step = jax.jit(make_eval_step(model)).lower(params, batch_shapes(mesh, *shape)).compile()
  with tqdm(total=options.eval_steps, unit="batch", disable=None, leave=False) as bar:
    record = evaluate(
      eval_step,
      params,
      in_step(batches),
      steps=options.eval_steps,
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
    f"loss {record['loss']:.4f}  perplexity {record['perplexity']:.3f}  "
    f"accuracy {record['accuracy']:.4f}  over {record['targets']:.0f} target tokens  "
    f"({record['tokens_per_second']:.0f} tokens/s)"
  )


if __name__ == "__main__":
  flags.run(main)
