"""Shapes of rows that people fine-tune on, recognised by their columns.

A shape names the columns that a row must have and converts the row to what is tokenised: parts of
a text, or a conversation for the tokenizer's chat template.

| data_format         | columns                                          | trained on            |
|---------------------|--------------------------------------------------|-----------------------|
| `messages`          | messages (role, content), tools                  | assistant turns       |
| `conversations`     | conversations (from, value), system, tools       | assistant turns       |
| `prompt_completion` | prompt, completion: both texts, or both messages | completion            |
| `instruction`       | instruction, input, output                       | output                |
| `dolly`             | instruction, context, response                   | response              |
| `chosen`            | prompt, chosen, rejected                         | chosen                |
| `text`              | text                                             | everything            |
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ll3m.data.config import ROW_SHAPES, TextField, TextProcessorConfig, parse_fields
from ll3m.data.skipped_examples import Unusable, require_unicode

Row = Mapping[str, Any]
# Parts of a text, each with whether it is trained.
Parts = list[tuple[str, bool]]

# Taori et al., 2023, https://github.com/tatsu-lab/stanford_alpaca, with the line break before the
# answer that the column `text` of the published dataset has.
_ALPACA = (
  "Below is an instruction that describes a task{paired}. Write a response that appropriately "
  "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"
# Roles of ShareGPT's `from`, and those of the programs that extended it.
_ROLES = {
  "human": "user", "user": "user",
  "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
  "bing": "assistant", "bard": "assistant",
  "system": "system",
  "tool": "tool", "observation": "tool", "function_response": "tool",
  "function_call": "function_call",
}  # fmt: skip


class Conversation(NamedTuple):
  """Messages for the chat template, and the tools that they may call."""

  messages: Any
  tools: Any = None


@dataclasses.dataclass(frozen=True)
class Shape:
  """A way to read rows.

  Attributes:
    name: Value of `data_format` that selects it, or "fields" or "template".
    title: Its columns, for messages.
    required: Columns that every row must have.
    convert: Function (row, has_template) -> `Parts` or `Conversation`; raises `Unusable`.
      `has_template` says whether the tokenizer has a chat template.
    is_chat: Whether rows need a chat template.
    splits: Whether a document that is longer than a row continues in the next one by default.
  """

  name: str
  title: str
  required: tuple[str, ...]
  convert: Callable[[Row, bool], Parts | Conversation]
  is_chat: bool = False
  splits: bool = False

  def lacks(self, columns: Sequence[str]) -> list[str]:
    """Returns the required columns that are not among `columns`."""
    return [name for name in self.required if name not in columns]


def as_text(row: Row, name: str) -> str:
  """Returns the text of a column; numbers and booleans are written as in JSON.

  Raises:
    Unusable: The column is missing, empty, or not text.
  """
  if name not in row:
    raise Unusable(f"no field {name!r}")
  value = row[name]
  if is_missing(value):
    raise Unusable(f"field {name!r} is null")
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, int | float):
    return repr(value)
  if not isinstance(value, str):
    kind = {list: "a list", dict: "an object", bytes: "bytes"}.get(type(value))
    raise Unusable(f"field {name!r} is {kind or type(value).__name__}, not text")
  return require_unicode(value)


def is_missing(value: Any) -> bool:
  """Returns whether a value is absent; for absent values, pandas writes NaN and Arrow null."""
  return value is None or (isinstance(value, float) and math.isnan(value))


def _optional(row: Row, name: str) -> str:
  return "" if is_missing(row.get(name)) else as_text(row, name)


def _answer(row: Row, name: str) -> str:
  text = as_text(row, name)
  if not text.strip():
    raise Unusable(f"field {name!r} is empty")
  return text


def _read_text(row: Row, _: bool) -> Parts:
  return [(_answer(row, "text"), True)]


def _read_messages(row: Row, _: bool) -> Conversation:
  if is_missing(row["messages"]):
    raise Unusable("field 'messages' is null")
  return Conversation(row["messages"], _given(row.get("tools")))


def _given(value: Any) -> Any:
  return None if is_missing(value) else value


def _read_instruction(
  row: Row, has_template: bool, *, context: str, answer: str
) -> Parts | Conversation:
  task, extra, said = _answer(row, "instruction"), _optional(row, context), _answer(row, answer)
  if has_template:
    asked = f"{task}\n\n{extra}" if extra.strip() else task
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return Conversation(messages)
  given = f"### Input:\n{extra}\n\n" if extra.strip() else ""
  prompt = _ALPACA.format(paired=_PAIRED if given else "", instruction=task, input=given)
  return [(prompt, False), (said, True)]


def _read_conversations(row: Row, _: bool) -> Conversation:
  turns = row["conversations"]
  if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
    raise Unusable("conversations is not a list of turns")
  messages = [_turn(turn) for turn in turns]
  system = _optional(row, "system")
  if system.strip() and messages[0].get("role") != "system":
    messages.insert(0, {"role": "system", "content": system})
  return Conversation(messages, _given(row.get("tools")))


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
  if "role" in turn and "from" not in turn:
    return turn
  role = _ROLES.get(turn.get("from"))
  if role is None:
    raise Unusable(f"a turn must be from one of {', '.join(_ROLES)}, got {turn.get('from')!r}")
  if role != "function_call":
    weight = {} if is_missing(turn.get("weight")) else {"weight": turn["weight"]}
    return {"role": role, "content": turn.get("value")} | weight
  try:
    call = json.loads(turn["value"])
    function = {"name": call["name"], "arguments": call["arguments"]}
  except (KeyError, TypeError, ValueError):
    raise Unusable("a function_call is not JSON with name and arguments") from None
  return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def _read_prompt_completion(row: Row, _: bool) -> Parts | Conversation:
  prompt, completion = row["prompt"], row["completion"]
  if isinstance(prompt, list) or isinstance(completion, list):
    return _continue(prompt, completion, "completion", _given(row.get("tools")))
  return [(_optional(row, "prompt"), False), (_answer(row, "completion"), True)]


def _continue(prompt: Any, answer: Any, name: str, tools: Any = None) -> Conversation:
  """Joins the messages of a prompt, which are not trained, and those of an answer."""
  if isinstance(prompt, str):
    prompt = [{"role": "user", "content": prompt}]
  if isinstance(answer, str):
    answer = [{"role": "assistant", "content": answer}]
  for part, values in (("prompt", prompt), (name, answer)):
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
      raise Unusable(f"{part} is not a list of messages")
  return Conversation([*({**message, "weight": 0} for message in prompt), *answer], tools)


def _read_chosen(row: Row, _: bool) -> Parts | Conversation:
  """Reads the preferred answer of a pair, whose prompt may be what both answers begin with."""
  prompt, chosen, rejected = _given(row.get("prompt")), row["chosen"], row["rejected"]
  if isinstance(chosen, list):
    turns = rejected if isinstance(rejected, list) else []
    shared = 0
    while shared < min(len(chosen), len(turns)) and chosen[shared] == turns[shared]:
      shared += 1
    # Some datasets repeat the prompt in front of both answers.
    begun = chosen[:shared] if shared or prompt is None else prompt
    return _continue(begun, chosen[shared:], "chosen", _given(row.get("tools")))
  if isinstance(prompt, list):
    return _continue(prompt, chosen, "chosen", _given(row.get("tools")))
  said = _answer(row, "chosen")
  if prompt is not None:
    return [(as_text(row, "prompt"), False), (said, True)]
  shared = _shared_prefix(said, as_text(row, "rejected"))
  return [(said[:shared], False), (said[shared:], True)]


def _shared_prefix(first: str, second: str) -> int:
  """Returns the length of what two texts begin with, without a space at its end (as TRL does)."""
  pairs = enumerate(zip(first, second, strict=False))
  end = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
  return end - 1 if end and first[end - 1] == " " else end


_SHAPES = (
  Shape("messages", "messages", ("messages",), _read_messages, is_chat=True),
  Shape(
    "conversations", "conversations (from/value)", ("conversations",), _read_conversations,
    is_chat=True,
  ),
  Shape("chosen", "prompt/chosen/rejected", ("chosen", "rejected"), _read_chosen),
  Shape(
    "prompt_completion", "prompt/completion", ("prompt", "completion"), _read_prompt_completion
  ),
  Shape(
    "instruction", "instruction/input/output", ("instruction", "output"),
    functools.partial(_read_instruction, context="input", answer="output"),
  ),
  Shape(
    "dolly", "instruction/context/response", ("instruction", "response"),
    functools.partial(_read_instruction, context="context", answer="response"),
  ),
  Shape("text", "text", ("text",), _read_text, splits=True),
)  # fmt: skip
SHAPES = {shape.name: shape for shape in _SHAPES}
assert tuple(SHAPES) == ROW_SHAPES


def fields_shape(config: TextProcessorConfig) -> Shape:
  """Returns the shape of `text_processor.fields`.

  Raises:
    ValueError: `messages` is combined with other fields.
  """
  fields = parse_fields(config.fields)
  names = tuple(dict.fromkeys(name for field in fields for name in field.names))
  if "messages" in names:
    if len(names) > 1:
      raise ValueError(
        f"`text_processor.fields`: messages must be the only field, got {config.fields!r}"
      )
    return SHAPES["messages"]
  read = functools.partial(_read_fields, fields=fields, separator=config.subfield_separator)
  return Shape("fields", config.fields, names, read, splits=True)


def _read_fields(row: Row, _: bool, *, fields: Sequence[TextField], separator: str) -> Parts:
  parts = [
    (separator.join(as_text(row, name) for name in field.names), field.loss) for field in fields
  ]
  if not any(text.strip() for text, learn in parts if learn):
    raise Unusable("no text to train on")
  return parts


_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ESCAPE = re.compile(r"\\([\\nrt])")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def template_shape(prompt: str | None, completion: str | None) -> Shape:
  r"""Returns the shape of texts with columns in braces.

  Args:
    prompt: Template of the part that is not trained, such as `Question: {question}\nAnswer: `.
      `\n`, `\t`, `\r` and `\\` are escapes, and `{{` and `}}` are braces.
    completion: Template of the part that is trained.

  Raises:
    ValueError: A template is malformed, or there is no completion or no column in it.
  """
  if not completion:
    raise ValueError("`completion` must be given with `prompt_template`, for example '{answer}'")
  asked = _parse_template("prompt_template", prompt or "")
  said = _parse_template("completion", completion)
  names = tuple(dict.fromkeys(name for part in (asked, said) for _, name in part if name))
  if not any(name for _, name in said):
    raise ValueError(f"`completion` must contain a column in braces, got {completion!r}")

  read = functools.partial(_read_template, asked=asked, said=said)
  return Shape("template", "/".join(names), names, read)


# Literal texts, each with the name of the column that follows it; "" for none.
_Template = list[tuple[str, str]]


def _read_template(row: Row, _: bool, *, asked: _Template, said: _Template) -> Parts:
  for _, name in said:
    if name:
      _answer(row, name)

  def fill(parts: _Template) -> str:
    return "".join(text + (_optional(row, name) if name else "") for text, name in parts)

  return [(fill(asked), False), (fill(said), True)]


def _parse_template(option: str, template: str) -> _Template:
  template = _ESCAPE.sub(lambda match: _ESCAPED[match[1]], template)
  parts, literal, end = [], "", 0
  for match in _PLACEHOLDER.finditer(template):
    literal += template[end : match.start()]
    end = match.end()
    if match[0] in ("{{", "}}"):
      literal += match[0][0]
    elif match[1]:
      parts.append((literal, match[1].strip()))
      literal = ""
    else:
      raise ValueError(
        f"`{option}` must have columns in braces, such as {{question}}, and {{{{ for a brace, got "
        f"{template!r}"
      )
  return [*parts, (literal + template[end:], "")]


def recognise(columns: Sequence[str]) -> Shape | None:
  """Returns the first shape whose columns are all present, or None."""
  return next((shape for shape in _SHAPES if not shape.lacks(columns)), None)
