"""From an example of a json or huggingface dataset to a document."""

import math
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32

from ll3m.data import chat
from ll3m.data.config import TextField, TextProcessorConfig, parse_fields
from ll3m.data.packing import Document
from ll3m.data.skipped_examples import Unusable, require_unicode
from ll3m.data.tokenizer import Tokenizer

_MESSAGES = "messages"


class TextProcessor:
  """Puts the chosen fields of an example together: BOS, the tokens of their text, EOS.

  The text is tokenised as a whole, as a model reads it, wherever fields meet. Tokens that hold a
  character of a field outside brackets carry loss. `messages` (with `tools`, if an example has
  them) goes through the tokenizer's chat template instead.
  """

  def __init__(self, config: TextProcessorConfig, tokenizer: Tokenizer):
    """Binds the choice of fields to a tokenizer.

    Raises:
      ValueError: if messages are asked for and the tokenizer has no chat template.
    """
    self._tokenizer = tokenizer
    self._separator = config.subfield_separator
    self._fields = parse_fields(config.fields)
    self._warned = False
    names = {name for field in self._fields for name in field.names}
    if _MESSAGES in names and len(names) > 1:
      raise ValueError(f"text_processor.fields: messages stands alone, got {config.fields!r}")
    if _MESSAGES in names and not tokenizer.chat_template:
      raise ValueError("text_processor.fields=messages: the tokenizer has no chat template")

  def check(self, example: dict[str, Any]) -> None:
    """Does all but the tokenising.

    Raises:
      Unusable: if the example cannot become a document.
    """
    self._read(example)

  def __call__(self, example: dict[str, Any]) -> Document:
    """Returns the example as a document of tokens with a loss flag each.

    Raises:
      Unusable: if it cannot become one.
    """
    parts = self._read(example)
    if isinstance(parts, chat.Rendered):
      document = Document(*chat.encode(self._tokenizer, parts))
      roles = {message["role"] for message in example[_MESSAGES]}
      if document.loss.all() and roles != {"assistant"} and not self._warned:
        self._warned = True
        logging.warning(
          "the chat template marks whole conversations as the assistant's: what others say is "
          "trained too"
        )
    else:
      prefix, (ids, loss) = self._tokenizer.prefix, self._encode(parts)
      tokens = np.array([*prefix, *ids, self._tokenizer.eos_id], np.int32)
      document = Document(tokens, np.zeros_like(tokens))
      document.loss[len(prefix) : -1] = loss
      document.loss[-1] = parts[-1][1]  # EOS is learnt with the last field
    if not document.loss[1:].any():  # nothing predicts the first token
      raise Unusable("no token to train on")
    return document

  def _encode(
    self, parts: list[tuple[str, bool]]
  ) -> tuple[list[int], int | Int32[np.ndarray, "n"]]:
    """Returns the ids of the joined parts, and 1 for those that are trained."""
    text = "".join(part for part, _ in parts)
    if all(learn for _, learn in parts):
      return self._tokenizer.encode(text), 1
    spans, end = [], 0
    for part, learn in parts:
      if learn:
        spans.append((end, end + len(part)))
      end += len(part)
    return self._tokenizer.encode_spans(text, spans)

  def _read(self, example: dict[str, Any]) -> chat.Rendered | list[tuple[str, bool]]:
    fields = self._fields
    if not fields:
      has_messages = _is_given(example.get(_MESSAGES))
      fields = (TextField((_MESSAGES if has_messages else "text",), loss=True),)
    if fields[0].names == (_MESSAGES,):
      tools = example.get("tools")
      try:
        return chat.render(
          self._tokenizer, example.get(_MESSAGES), tools if _is_given(tools) else None
        )
      except ValueError as error:
        raise Unusable(str(error)) from error
    parts = [
      (self._separator.join(_text(example, name) for name in field.names), field.loss)
      for field in fields
    ]
    if not any(text.strip() for text, learn in parts if learn):
      raise Unusable("no text to learn from")
    return parts


def _is_given(value: Any) -> bool:
  """Whether a row has a value: pandas writes NaN, and Arrow null, where it has none."""
  return value is not None and not (isinstance(value, float) and math.isnan(value))


def _text(example: dict[str, Any], name: str) -> str:
  if name not in example:
    raise Unusable(f"no field {name!r}")
  if not isinstance(example[name], str):
    raise Unusable(f"field {name!r} is not text")
  return require_unicode(example[name])
