"""Converts a published Hugging Face or GGUF model for use with the other commands.

python -m ll3m.convert --checkpoint_dir=DIR --output_dir=DIR [--model=PRESET] [--dtype=bf16]
"""

import dataclasses
import sys
from collections.abc import Sequence

from etils import epath

from ll3m.core import flags, options
from ll3m.core.dtypes import DTYPES, STORED


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """Flags of the command."""

  checkpoint_dir: str | None = options.option(
    None, "Folder of the published model (config.json and weights), or a .gguf file."
  )
  output_dir: str | None = options.option(None, "Folder to write; it must be new or empty.")
  output_file: str | None = options.option(None, "Alias of --output_dir.")
  model: str | None = options.option(
    None, "Preset that the model must match; by default any model that config.json describes."
  )
  checkpoint_type: str | None = options.option(
    None,
    "Type of the weight files to read if the folder holds several types.",
    choices=("safetensors", "pt", "gguf"),
  )
  dtype: str = options.option(
    "keep",
    "Dtype of the written parameters; keep leaves it unchanged (f32 for dequantised GGUF).",
    choices=("keep", *STORED),
  )
  text_only: bool = options.option(
    False, "Convert the text model of a multimodal one (Gemma 3), and omit the other tensors."
  )
  allow_nonfinite: bool = options.option(
    False, "Accept weights that hold NaN or infinities instead of failing."
  )

  def __post_init__(self):
    options.require(self, "checkpoint_dir")
    if not self.output_file:
      options.require(self, "output_dir")
    if self.output_dir and self.output_file and self.output_dir != self.output_file:
      raise ValueError(
        f"`output_dir`={self.output_dir} and `output_file`={self.output_file} differ; give one"
      )


FLAG_GROUPS = {"": ConvertConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Converts a model; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_convert, FLAG_GROUPS, argv, doc=__doc__)


def _convert(given: flags.Flags) -> None:
  """Opens and checks the model, converts it, and prints a report."""
  config = given[""]

  from ll3m.core.checkpoint import SOURCE, TOKENIZER
  from ll3m.core.object_store import writing
  from ll3m.core.progress import aligned
  from ll3m.data.tokenizer_faults import find_fault
  from ll3m.hf.conversion import convert_model
  from ll3m.hf.model_files import open_model

  output = config.output_dir or config.output_file
  model = open_model(
    config.checkpoint_dir, config.checkpoint_type, config.model, text_only=config.text_only
  )
  with writing(output):
    done = convert_model(
      model, output, DTYPES.get(config.dtype), allow_nonfinite=config.allow_nonfinite
    )
  if model.ignored:
    print(f"omitted {len(model.ignored)} tensors that are not parameters of the model:")
    print("\n".join(f"  {name}" for name in model.ignored))
  if not model.tokenizer_files:
    print(f"{config.checkpoint_dir} holds no tokenizer; later commands need --tokenizer.path")
  elif fault := find_fault(
    epath.Path(output) / TOKENIZER,
    model.config.vocab_size,
    source_dir=epath.Path(output) / SOURCE,
  ):
    print(f"{fault}; later commands need another tokenizer in --tokenizer.path")
  print(
    aligned(
      [
        ("converted", f"{model.family}, {done.parameters:,} parameters in {done.tensors} tensors"),
        ("written", f"{done.nbytes / 1e9:.2f} GB in {done.seconds:.1f} s to {output}"),
        ("to use it", f"python -m ll3m.generate --checkpoint={output} --prompt=..."),
        ("to train it", f"python -m ll3m.train --load_checkpoint=params::{output} ..."),
      ]
    )
  )


if __name__ == "__main__":
  sys.exit(main())
