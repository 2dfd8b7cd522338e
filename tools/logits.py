"""Writes a model's float32 logits for given tokens, for comparison with another program.

  python tools/logits.py --checkpoint=hf::DIR --tokens=tokens.npy --output=logits.npy

Dimensions: B batch, T length, V vocabulary.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ll3m.core import flags, options


@dataclasses.dataclass(frozen=True)
class LogitsConfig:
  """Flags of the command."""

  checkpoint: str | None = options.option(
    None, "Converted folder, output_dir of a run, step folder of a run, or hf::DIR."
  )
  tokens: str | None = options.option(None, "File of token ids to read (.npy), integers [B, T].")
  output: str | None = options.option(None, "File of logits to write (.npy), float32 [B, T, V].")

  def __post_init__(self):
    options.require(self, "checkpoint", "tokens", "output")


def read_tokens(path: Path) -> np.ndarray:
  """Reads token ids.

  Returns:
    Integers [B, T].

  Raises:
    FileNotFoundError: The file does not exist.
    ValueError: The file is not a .npy file of integers [B, T], or the array is empty.
  """
  if not path.is_file():
    raise FileNotFoundError(f"`tokens`: no such file: {path}")
  try:
    tokens = np.load(path, allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f"{path} is not a .npy file of numbers: {error}") from error
  if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer):
    kind = getattr(tokens, "dtype", "several arrays")
    raise ValueError(f"{path} must hold integers, got {kind}")
  if tokens.ndim != 2 or not tokens.size:
    raise ValueError(f"{path} must have the shape [B, T], got {list(tokens.shape)}")
  return tokens


def check_tokens(tokens: np.ndarray, vocab_size: int, max_positions: int) -> None:
  """Checks that a model accepts tokens [B, T].

  Raises:
    ValueError: An id is outside the vocabulary, or the rows are too long.
  """
  if tokens.min() < 0 or tokens.max() >= vocab_size:
    wrong = tokens.min() if tokens.min() < 0 else tokens.max()
    raise ValueError(f"token ids must be at least 0 and below {vocab_size}, got {wrong}")
  if tokens.shape[1] > max_positions:
    raise ValueError(
      f"rows must have at most {max_positions} tokens for this model, got {tokens.shape[1]}"
    )


FLAG_GROUPS = {"": LogitsConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Writes logits; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_write, FLAG_GROUPS, argv, doc=__doc__)


def _write(given: flags.Flags) -> None:
  """Computes and writes logits row by row, with one row's logits in memory."""
  options = given[""]
  tokens = read_tokens(Path(options.tokens))

  import jax

  from ll3m.hf.model_source import open_source
  from ll3m.models.transformer import make_model

  source = open_source(options.checkpoint)
  config = source.config
  check_tokens(tokens, config.vocab_size, config.max_positions)
  model = make_model(config)
  forward = jax.jit(lambda params, row: model.logits(params, model.hidden(params, row))[0])
  output = Path(options.output)
  output.parent.mkdir(parents=True, exist_ok=True)
  shape = (*tokens.shape, config.vocab_size)
  # Parameters keep the checkpoint's dtype; the model casts them at each use.
  params = source.load_params()
  unfinished = output.with_name(output.name + ".unfinished")
  logits = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape)
  # TPUs round float32 operands to bf16 by default.
  with jax.default_matmul_precision("highest"):
    for index, row in enumerate(tokens.astype(np.int32)):
      logits[index] = forward(params, row[None])
  logits.flush()
  unfinished.replace(output)
  print(f"wrote float32 logits {list(shape)} to {output}")


if __name__ == "__main__":
  sys.exit(main())
