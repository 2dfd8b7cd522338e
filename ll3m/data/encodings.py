"""Ids of the `tokenizers` library, and the characters of a text that they stand for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32


def ids_before_text(encoder: tokenizers.Tokenizer) -> list[int]:
  """Returns the ids that the post-processor puts before a text."""
  ids, text = (encoder.encode("x", add_special_tokens=special).ids for special in (True, False))
  starts = range(len(ids) - len(text) + 1)
  return ids[: next((i for i in starts if ids[i : i + len(text)] == text), 0)]


def token_of(token_id: int, added: dict[str, int], vocabulary: Any) -> str:
  """Returns the text of the token with this id, or ""."""
  items = (
    vocabulary.items()
    if isinstance(vocabulary, dict)
    else ((piece, i) for i, (piece, *_) in enumerate(vocabulary))
  )
  return next((text for text, i in (*added.items(), *items) if i == token_id), "")


def owned_by(
  spans: Sequence[tuple[int, int]], encoding: tokenizers.Encoding
) -> Int32[np.ndarray, "n"]:
  """Returns 1 for each token that shares a character with a span, else 0."""
  owned = np.zeros(len(encoding), np.int32)
  for start, end in spans:
    # Characters that normalisation removes have no token.
    held = (encoding.char_to_token(i) for i in range(start, end))
    first = next((token for token in held if token is not None), None)
    if first is None:
      continue
    held = (encoding.char_to_token(i) for i in range(end - 1, start - 1, -1))
    last = next(token for token in held if token is not None)
    # `last` is only the first token of a character that is split into bytes.
    while last + 1 < len(owned) and encoding.token_to_chars(last + 1)[0] < end:
      last += 1
    owned[first : last + 1] = 1
  return owned
