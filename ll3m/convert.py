"""Converts a published Hugging Face or GGUF model to a folder that the other commands read.

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
  """What to convert, and to what."""

  checkpoint_dir: str | None = options.option(
    None, "The folder of the published model (config.json and weights), or a .gguf file."
  )
  output_dir: str | None = options.option(None, "The folder to write; it must not exist yet.")
  output_file: str | None = options.option(None, "Another name of --output_dir.")
  model: str | None = options.option(
    None, "The preset that the model must be; by default its config.json says what it is."
  )
  checkpoint_type: str | None = options.option(
    None,
    "Which files to read, where the folder holds several kinds.",
    choices=("safetensors", "pt", "gguf"),
  )
  dtype: str = options.option(
    "keep",
    "Type of the written parameters; keep leaves them as they are (dequantised GGUF: f32).",
    choices=("keep", *STORED),
  )
  allow_nonfinite: bool = options.option(
    False, "Convert weights that hold NaN or infinities too, instead of refusing them."
  )

  def __post_init__(self):
    options.require(self, "checkpoint_dir")
    if not self.output_file:
      options.require(self, "output_dir")
    if self.output_dir and self.output_file and self.output_dir != self.output_file:
      raise ValueError(
        f"`output_dir`={self.output_dir} and `output_file`={self.output_file} name two folders"
      )


FLAG_GROUPS = {"": ConvertConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Converts a model; see `flags.call` for `argv` and the exit code that it returns."""
  return flags.call(_convert, FLAG_GROUPS, argv, doc=__doc__)


def _convert(given: flags.Flags) -> None:
  """Opens and checks the model, converts it, and reports what was done."""
  config = given[""]

  from ll3m.core.checkpoint import SOURCE, TOKENIZER
  from ll3m.core.object_store import writing
  from ll3m.data.tokenizer import find_fault
  from ll3m.hf.conversion import convert_model
  from ll3m.hf.model_files import open_model

  output = config.output_dir or config.output_file
  model = open_model(config.checkpoint_dir, config.checkpoint_type, config.model)
  with writing(output):
    done = convert_model(
      model, output, DTYPES.get(config.dtype), allow_nonfinite=config.allow_nonfinite
    )
  if model.ignored:
    print(f"ignored {len(model.ignored)} tensors that are not parameters:")
    print("\n".join(f"  {name}" for name in model.ignored))
  if not model.tokenizer_files:
    print(f"{config.checkpoint_dir} holds no tokenizer; --tokenizer.path has to name one later")
  elif fault := find_fault(
    epath.Path(output) / TOKENIZER,
    model.config.vocab_size,
    source_dir=epath.Path(output) / SOURCE,
  ):
    print(f"{fault}; --tokenizer.path has to name another tokenizer later")
  print(
    f"converted a {model.family} model of {done.parameters:,} parameters "
    f"({done.tensors} tensors, {done.nbytes / 1e9:.2f} GB in {done.seconds:.1f} s) to {output}"
  )


if __name__ == "__main__":
  sys.exit(main())
