"""From an example of a json or huggingface dataset to a document."""

import json
from typing import Any

import numpy as np

from ll3m.data import chat
from ll3m.data.config import TextField, TextProcessorConfig, parse_fields
from ll3m.data.packing import Document
from ll3m.data.tokenizer import Tokenizer
from ll3m.data.unusable import Unusable, require_unicode

_MESSAGES = "messages"


class TextProcessor:
  """Puts the chosen fields of an example together: BOS, each field's tokens, EOS.

  Fields are tokenised one by one, as a prompt is when it is answered; tokens of bracketed
  fields carry no loss. `messages` goes through the tokenizer's chat template instead.
  """

  def __init__(self, config: TextProcessorConfig, tokenizer: Tokenizer):
    """Binds the choice of fields to a tokenizer.

    Raises:
      ValueError: if messages are asked for and the tokenizer has no chat template.
    """
    self._tokenizer = tokenizer
    self._separator = config.subfield_separator
    self._fields = parse_fields(config.fields)
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
      return Document(*chat.encode(self._tokenizer, parts))
    tokens, loss = list(self._tokenizer.prefix), [0] * len(self._tokenizer.prefix)
    for text, learn in parts:
      ids = self._tokenizer.encode(text)
      tokens += ids
      loss += [int(learn)] * len(ids)
    tokens.append(self._tokenizer.eos_id)
    loss.append(loss[-1] if parts[-1][0] else 1)
    return Document(np.array(tokens, np.int32), np.array(loss, np.int32))

  def _read(self, example: dict[str, Any]) -> chat.Rendered | list[tuple[str, bool]]:
    fields = self._fields
    if not fields:
      fields = (TextField((_MESSAGES if _MESSAGES in example else "text",), loss=True),)
    if fields[0].names == (_MESSAGES,):
      try:
        return chat.render(self._tokenizer, example.get(_MESSAGES))
      except ValueError as error:
        raise Unusable(str(error)) from error
    parts = [
      (self._separator.join(_text(example, name) for name in field.names), field.loss)
      for field in fields
    ]
    if not any(text for text, learn in parts if learn):
      raise Unusable("no text to learn from")
    return parts


def _text(example: dict[str, Any], name: str) -> str:
  if name not in example:
    raise Unusable(f"no field {name!r}")
  if not isinstance(example[name], str):
    raise Unusable(f"field {name!r} is not text")
  return require_unicode(example[name])


def parse_json(line: bytes) -> dict[str, Any]:
  """Parses one JSON object; a file's byte order mark may stand before it.

  Raises:
    Unusable: if it is anything else.
  """
  try:
    example = json.loads(line.decode("utf-8-sig"))
  except UnicodeDecodeError:
    raise Unusable("not UTF-8") from None
  except (json.JSONDecodeError, RecursionError):
    raise Unusable("not JSON") from None
  if not isinstance(example, dict):
    raise Unusable("not a JSON object")
  return example
