"""Shows what a model would be trained on: `python -m ll3m.inspect --data=FILES --checkpoint=PATH`.

Reads all rows with the checkpoint's tokenizer, as ll3m.train would with the same flags. Reports
their shape, the lengths of documents, the share of trained tokens, what would be cut off or
dropped, duplicates, and unusable rows with their places; then prints the first documents with the
tokens that are trained: in color on a terminal, else in brackets. Reads no weights.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from etils import epath

from ll3m.core import flags
from ll3m.core.options import option, require
from ll3m.data import gin_settings
from ll3m.data.config import (
  DatasetConfig,
  GinConfig,
  StrictConfig,
  TokenizerConfig,
  short_names,
)
from ll3m.data.dataset_spec import resolve
from ll3m.data.preview import describe_document
from ll3m.data.row_corpus import open_corpus
from ll3m.data.statistics import describe, first_documents, measure, plot
from ll3m.data.tokenizer import load_tokenizer
from ll3m.hf.model_source import open_source


@dataclasses.dataclass(frozen=True)
class InspectOptions(GinConfig, StrictConfig):
  """Flags of the command, without those of the data and the tokenizer."""

  checkpoint: str | None = option(
    None,
    "Model whose tokenizer is used: a converted folder, output_dir of a run, step folder of a run, "
    "or hf::DIR. Not needed with tokenizer.path.",
  )
  show: int = option(3, "Number of documents to print.")
  plot: str | None = option(None, "PNG file to write the histogram of lengths to.")
  json: bool = option(False, "Print the report as one JSON object, without documents.")
  workers: int = option(os.cpu_count() or 1, "Number of processes that tokenise.")

  def __post_init__(self):
    for name, least in (("show", 0), ("workers", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")


SHORT = short_names("dataset")
FLAG_GROUPS = {"": InspectOptions, "tokenizer": TokenizerConfig, "dataset": DatasetConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the report; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_inspect, FLAG_GROUPS, argv, doc=__doc__, short=SHORT)


def _inspect(given: flags.Flags) -> None:
  options, dataset = given[""], given["dataset"]
  with given.within("dataset"):
    if dataset.type == "seqio":
      require(dataset, "data")
    spec = resolve(dataset, passes=1, strict=options.strict, workers=options.workers)
    if not spec.is_countable:
      raise ValueError(
        "`data`: files and datasets are inspected, not mixtures, TFRecord shards or streams; "
        "ll3m.train --show_batches shows them"
      )
  if options.plot is not None and not epath.Path(options.plot).parent.is_dir():
    raise FileNotFoundError(f"`plot`: no such folder: {epath.Path(options.plot).parent}")
  tokenizer_config = gin_settings.apply(options, given["tokenizer"])
  source = None
  if tokenizer_config.other_path is None:
    require(options, "checkpoint")
    source = open_source(options.checkpoint, verify=False)  # no weights are read
  tokenizer = load_tokenizer(
    tokenizer_config,
    checkpoint_dir=source and source.tokenizer_dir,
    source_dir=source and source.source_dir,
    family=source and source.family,
  )
  with given.within("dataset"):
    corpus = open_corpus(spec.counted(), tokenizer)
  found = measure(corpus, spec, tokenizer)
  if options.plot is not None:
    plot(found.tokens, epath.Path(options.plot))
  if options.json:
    print(json.dumps(found.to_json()))
    return
  print(describe(found, corpus))
  for number, document in enumerate(first_documents(corpus, options.show), start=1):
    title = f"document {number}"
    print(f"\n{describe_document(title, document, tokenizer, color=sys.stdout.isatty())}", end="")


if __name__ == "__main__":
  sys.exit(main())
