"""Encoders whose control tokens have private names that no text contains.

An encoder of the tokenizers library matches its added tokens in any text, and a model that has
control strings as pieces can produce them by itself. With private names, no text yields control
tokens, and all other tokens are the same as before.
"""

import json
import secrets
from collections.abc import Collection
from typing import Any

import tokenizers

from ll3m.data.tokenizer_files import ENCODER

# Prefix and suffix of a control token's private name: Unicode noncharacters, drawn at random in
# each process, so that a text contains them only with probability 2^-60.
SEAL = "".join(chr(0xFDD0 + secrets.randbelow(32)) for _ in range(12))


def build_sealed(
  source: dict[str, Any], controls: Collection[str], name: str
) -> tokenizers.Tokenizer:
  """Builds an encoder whose control tokens are named SEAL + token + SEAL.

  Args:
    source: A parsed tokenizer.json.
    controls: Texts of the control tokens.
    name: Name of the tokenizer, for messages.

  Raises:
    ValueError: The tokenizers library cannot read `source`.
  """
  try:
    encoder = tokenizers.Tokenizer.from_str(json.dumps(_sealed(source, set(controls))))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{name}/{ENCODER} cannot be read: {error}") from error
  encoder.no_padding()
  encoder.no_truncation()
  return encoder


def _sealed(source: dict[str, Any], controls: set[str]) -> dict[str, Any]:
  """Gives control tokens their private names in a parsed tokenizer.json.

  The vocabulary is renamed too: a model that has control strings as pieces (Unigram, or BPE with
  merges that form them) would otherwise produce them from text.
  """

  def seal(token: Any) -> Any:
    return SEAL + token + SEAL if token in controls else token

  model, vocabulary = dict(source["model"]), source["model"]["vocab"]
  if isinstance(vocabulary, dict):
    model["vocab"] = {seal(piece): i for piece, i in vocabulary.items()}
  else:  # a list of pieces with scores
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
