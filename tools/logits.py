"""Writes a model's float32 logits for given tokens, to be compared with another program's.

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
  """What to compute."""

  checkpoint: str | None = options.option(
    None, "A converted folder, a run's output_dir, one of its steps, or hf::DIR."
  )
  tokens: str | None = options.option(None, "A .npy file of token ids, integers [B, T].")
  output: str | None = options.option(None, "The .npy file to write, float32 [B, T, V].")

  def __post_init__(self):
    options.require(self, "checkpoint", "tokens", "output")


def read_tokens(path: Path) -> np.ndarray:
  """Reads token ids.

  Returns:
    integers [B, T].

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not a .npy file of integers [B, T], or an empty one.
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
  """Compares tokens [B, T] with what a model takes.

  Raises:
    ValueError: an id outside the vocabulary, or rows that are too long.
  """
  if tokens.min() < 0 or tokens.max() >= vocab_size:
    wrong = tokens.min() if tokens.min() < 0 else tokens.max()
    raise ValueError(f"token ids must be at least 0 and below {vocab_size}, got {wrong}")
  if tokens.shape[1] > max_positions:
    raise ValueError(
      f"the model takes at most {max_positions} tokens in a row, got {tokens.shape[1]}"
    )


FLAG_GROUPS = {"": LogitsConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Writes logits; see `flags.call` for `argv` and the exit code that it returns."""
  return flags.call(_write, FLAG_GROUPS, argv, doc=__doc__)


def _write(given: flags.Flags) -> None:
  """Computes row by row, so that memory holds one row's logits."""
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
  # Parameters stay in the checkpoint's dtype; the model casts each where it is used.
  params = source.load_params()
  unfinished = output.with_name(output.name + ".unfinished")
  logits = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape)
  # TPUs round float32 operands to bf16 unless told otherwise.
  with jax.default_matmul_precision("highest"):
    for index, row in enumerate(tokens.astype(np.int32)):
      logits[index] = forward(params, row[None])
  logits.flush()
  unfinished.replace(output)
  print(f"wrote float32 logits {list(shape)} to {output}")


if __name__ == "__main__":
  sys.exit(main())
