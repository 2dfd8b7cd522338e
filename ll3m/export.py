"""Exports a model as a Hugging Face folder, which transformers loads.

python -m ll3m.export --checkpoint=PATH --output_dir=DIR [--dtype=bf16] [--max_shard_size=5GB]
"""

import dataclasses
import sys
from collections.abc import Sequence

from ll3m.core import flags, options
from ll3m.core.dtypes import DTYPES, STORED


@dataclasses.dataclass(frozen=True)
class ExportConfig(options.VerifyConfig):
  """Flags of the command."""

  checkpoint: str | None = options.option(
    None, "Converted folder, output_dir of a run (selects the latest valid step), or step folder."
  )
  output_dir: str | None = options.option(None, "Folder to write; it must be new or empty.")
  dtype: str = options.option(
    "keep",
    "Dtype of the written tensors; keep leaves it unchanged.",
    choices=("keep", *STORED),
  )
  max_shard_size: str = options.option("5GB", "Maximum size of a weight file, as in 5GB or 200MB.")

  def __post_init__(self):
    options.require(self, "checkpoint", "output_dir")


FLAG_GROUPS = {"": ExportConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Exports a model; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_export, FLAG_GROUPS, argv, doc=__doc__)


def _export(given: flags.Flags) -> None:
  """Exports a model and prints a report."""
  config = given[""]

  from ll3m.core.object_store import writing
  from ll3m.core.progress import aligned
  from ll3m.data.tokenizer_faults import find_fault
  from ll3m.hf.exporting import export_checkpoint, parse_size
  from ll3m.hf.model_source import open_converted

  if config.checkpoint.startswith("hf::"):
    raise ValueError(
      f"`checkpoint` must be a converted folder or a run, got {config.checkpoint}, which is "
      f"already a Hugging Face folder"
    )
  checkpoint = open_converted(config.checkpoint, verify=config.verify)
  with writing(config.output_dir):
    done = export_checkpoint(
      checkpoint,
      config.output_dir,
      dtype=DTYPES.get(config.dtype),
      max_shard_bytes=parse_size(config.max_shard_size),
    )
  if checkpoint.tokenizer_dir is None:
    print(f"{config.checkpoint} holds no tokenizer; none was exported")
  elif fault := find_fault(
    checkpoint.tokenizer_dir, checkpoint.config.vocab_size, source_dir=checkpoint.source_dir
  ):
    print(f"the tokenizer was exported unchanged: {fault}")
  dtypes = " and ".join(done.dtypes)
  print(
    aligned(
      [
        ("exported", f"{checkpoint.family}, {done.parameters:,} parameters"),
        ("tensors", f"{done.tensors} of {dtypes}"),
        ("written", f"{done.nbytes / 1e9:.2f} GB in {done.seconds:.1f} s to {config.output_dir}"),
        ("to use it", f'AutoModelForCausalLM.from_pretrained("{config.output_dir}")'),
      ]
    )
  )


if __name__ == "__main__":
  sys.exit(main())
