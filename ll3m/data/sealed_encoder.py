"""Encoders that know control tokens by names which no text can spell.

A tokenizers encoder finds its added tokens in any text, and a model that holds control strings as
pieces arrives at them by itself. Renamed, they are out of reach of text, and everything else is
cut exactly as before.
"""

import json
import secrets
from collections.abc import Collection
from typing import Any

import tokenizers

from ll3m.data.tokenizer_files import ENCODER

# Begins and ends the private name of a control token: noncharacters of Unicode, drawn anew in each
# process, so that no text holds them but by a chance of 2^-60.
SEAL = "".join(chr(0xFDD0 + secrets.randbelow(32)) for _ in range(12))


def build_sealed(
  source: dict[str, Any], controls: Collection[str], name: str
) -> tokenizers.Tokenizer:
  """Builds an encoder whose control tokens are called SEAL + token + SEAL.

  Args:
    source: A parsed tokenizer.json.
    controls: The texts of the control tokens.
    name: The tokenizer's, for messages.

  Raises:
    ValueError: the library cannot read it.
  """
  try:
    encoder = tokenizers.Tokenizer.from_str(json.dumps(_sealed(source, set(controls))))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{name}/{ENCODER} cannot be read: {error}") from error
  encoder.no_padding()
  encoder.no_truncation()
  return encoder


def _sealed(source: dict[str, Any], controls: set[str]) -> dict[str, Any]:
  """Gives control tokens their private names, in the parsed tokenizer.json.

  The vocabulary is renamed too: a model that holds its control strings as pieces (Unigram, or
  BPE with merges that lead to them) would arrive at them from text.
  """

  def seal(token: Any) -> Any:
    return SEAL + token + SEAL if token in controls else token

  model, vocabulary = dict(source["model"]), source["model"]["vocab"]
  if isinstance(vocabulary, dict):
    model["vocab"] = {seal(piece): i for piece, i in vocabulary.items()}
  else:  # of pieces with scores
    model["vocab"] = [[seal(piece), *rest] for piece, *rest in vocabulary]
  if model.get("unk_token") is not None:
    model["unk_token"] = seal(model["unk_token"])
  if model.get("merges"):
    pairs = ((m, m.split(" ")) if isinstance(m, str) else (m, m) for m in model["merges"])
    model["merges"] = [
      merge for merge, (left, right) in pairs if controls.isdisjoint((left, right, left + right))
    ]
  added = [token | {"content": seal(token["content"])} for token in source["added_tokens"] or []]
  return source | {"model": model, "added_tokens": added}
