"""Conversations through a tokenizer's own chat template, with loss on assistant turns only.

What users wrote never becomes a control token: control strings inside messages are marked before
the template sees them, so that only the template's own count.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from ll3m.data.chat_template import CLOSE, OPEN, apply_template
from ll3m.data.skipped_examples import require_unicode
from ll3m.data.tokenizer import Tokenizer


class Rendered(NamedTuple):
  """A conversation as text.

  Attributes:
    text: The text, with the marks of `Tokenizer.quote` in control strings that users wrote.
    spans: What the assistant says, in characters of `text`.
  """

  text: str
  spans: list[tuple[int, int]]


def render(tokenizer: Tokenizer, messages: Any, tools: Any = None) -> Rendered:
  """Renders a conversation and finds what its assistant says.

  A template that marks this with `{% generation %}` is taken at its word. Else a turn is what
  appears when it is added to the conversation up to there, after the header that the template
  gives to start an answer, up to and with the token that ends it: EOS, else the template's last
  control token after what was said; where there is neither, up to the last visible character.

  A turn whose message has `"weight": 0` is not trained.

  Args:
    tokenizer: Brings the template.
    messages: A list of {"role": ..., "content": ...}; of an assistant that calls functions,
      `tool_calls` may stand instead of the content.
    tools: The JSON schemas of the functions that the assistant may call: a list, or its JSON text.

  Raises:
    ValueError: if there is no template, the messages are malformed or not Unicode text, or the
      template refuses them, omits calls or tools, or rewrites earlier turns when later ones come.
  """
  messages, tools = _checked(messages), _checked_tools(tools)
  answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
  if not answers:
    raise ValueError("messages has no assistant turn")
  if not any(_says_something(messages[i]) for i in answers):
    raise ValueError("no text to learn from")
  trained = [i for i in answers if _weight(messages[i])]
  if not trained:
    raise ValueError("every assistant turn has the weight 0")
  apply = _renderer(tokenizer, messages, tools)
  whole = apply(messages)
  _check_calls(apply, messages, tools, whole)
  if OPEN in whole:
    found = _unmark(whole)
    if len(trained) == len(answers):
      return found
    if len(found.spans) != len(answers):
      raise ValueError(
        f"the chat template marks {len(found.spans)} parts of {len(answers)} assistant turns, so "
        "that a weight of 0 cannot be placed"
      )
    spans = [span for i, span in zip(answers, found.spans, strict=True) if i in trained]
    return Rendered(found.text, spans)
  return Rendered(whole, [_find_turn(tokenizer, apply, messages, whole, i) for i in trained])


def encode(
  tokenizer: Tokenizer, rendered: Rendered
) -> tuple[Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
  """Tokenises a conversation.

  Returns:
    The ids, and 1 for each token that holds a character of a span, else 0. So a token that joins
    the template's last character before an answer with the answer's first is trained, as in
    transformers.
  """
  ids, loss = tokenizer.encode_rendered(rendered.text, rendered.spans)
  return np.array(ids, np.int32), loss


def encode_prompt(tokenizer: Tokenizer, messages: Any, tools: Any = None) -> list[int]:
  """Returns the ids of a conversation that the assistant is to continue.

  Raises:
    ValueError: as `render`.
  """
  messages, tools = _checked(messages), _checked_tools(tools)
  text = _renderer(tokenizer, messages, tools)(messages, add_generation_prompt=True)
  return tokenizer.encode_rendered(_unmark(text).text)[0]


def _renderer(tokenizer: Tokenizer, messages: list[dict], tools: list | None) -> Callable[..., str]:
  """Returns the template as a function of messages, whose control strings it marks.

  Raises:
    ValueError: the tokenizer has no template.
  """
  templates = tokenizer.chat_templates
  template = templates.get("tool_use") if tools else None
  template = template or templates.get("default")
  if not template:
    raise ValueError("the tokenizer has no chat template")
  quoted_tools = _quoted(tokenizer, tools)

  def apply(messages: Sequence[dict], *, tools: Any = quoted_tools, **options: bool) -> str:
    text = apply_template(
      template, _quoted(tokenizer, messages), tokenizer.special_tokens, tools=tools, **options
    )
    return require_unicode(text)

  return apply


def _find_turn(
  tokenizer: Tokenizer, apply: Callable[..., str], messages: list[dict], whole: str, i: int
) -> tuple[int, int]:
  """Returns where the i-th message, an assistant's, begins and ends in the conversation."""
  upto = apply(messages[: i + 1])
  heads = (apply(messages[:i], add_generation_prompt=p) for p in (True, False))
  head = next((h for h in heads if upto.startswith(h)), None)
  if head is None or not whole.startswith(upto):
    raise ValueError("the chat template rewrites earlier turns and has no {% generation %}")
  turn = upto[len(head) :]
  said = _quoted(tokenizer, messages[i].get("content") or "")
  return len(head), len(head) + _end(tokenizer, turn, said)


def _end(tokenizer: Tokenizer, turn: str, said: str) -> int:
  """Returns where a turn ends; what follows, as a line break, belongs to the template."""
  eos = tokenizer.special_tokens["eos_token"]
  ends = [eos] if eos in turn else tokenizer.control_tokens
  end = max((turn.rfind(token) + len(token) for token in ends if token in turn), default=0)
  # A control token before what was said is part of a header.
  return end if end and said.strip() in turn[:end] else len(turn.rstrip())


def _checked(messages: Any) -> list[dict]:
  """Checks the form of messages, and drops keys without a value, as transformers does."""
  if not isinstance(messages, list) or not messages:
    raise ValueError("messages is not a list of messages")
  found = []
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise ValueError("a message lacks its role or content as text")
    content, calls = message.get("content"), message.get("tool_calls")
    # The OpenAI API gives null for an answer that only calls functions.
    if not isinstance(content, str) and (content is not None or message["role"] != "assistant"):
      raise ValueError("a message lacks its role or content as text")
    if calls and not isinstance(calls, list):
      raise ValueError("tool_calls is not a list")
    _weight(message)
    found.append({key: value for key, value in message.items() if value is not None})
  return found


def _checked_tools(tools: Any) -> list | None:
  if isinstance(tools, str) and tools.strip():  # Arrow cannot hold schemas that differ
    try:
      tools = json.loads(tools)
    except ValueError as error:
      raise ValueError("tools is not a list of JSON objects") from error
  if not tools:
    return None
  if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
    raise ValueError("tools is not a list of JSON objects")
  return tools


def _check_calls(
  apply: Callable[..., str], messages: list[dict], tools: list | None, whole: str
) -> None:
  """Checks that the template writes functions and calls; many drop them in silence.

  Raises:
    ValueError: it does not.
  """
  if tools and apply(messages, tools=None) == whole:
    raise ValueError("the chat template does not render tools")
  for i, message in enumerate(messages):
    if message.get("tool_calls"):
      without = {"content": ""} | {k: v for k, v in message.items() if k != "tool_calls"}
      try:
        lost = apply([*messages[:i], without, *messages[i + 1 :]]) == whole
      except ValueError:  # the template cannot do without
        continue
      if lost:
        raise ValueError("the chat template does not render tool_calls")


def _says_something(message: dict) -> bool:
  return bool(message.get("content", "").strip() or message.get("tool_calls"))


def _weight(message: dict) -> int:
  """Returns 1 if a turn is trained, 0 if not."""
  weight = message.get("weight")
  if weight is None:
    return 1
  if weight not in (0, 1):
    raise ValueError("the weight of a message is neither 0 nor 1")
  return int(weight)


def _quoted(tokenizer: Tokenizer, value: Any) -> Any:
  """Marks control strings in every text of messages or tools."""
  if isinstance(value, str):
    return tokenizer.quote(value)
  if isinstance(value, dict):
    return {_quoted(tokenizer, key): _quoted(tokenizer, item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_quoted(tokenizer, item) for item in value]
  return value


def _unmark(text: str) -> Rendered:
  """Turns the marks of `{% generation %}` into spans."""
  plain, spans = "", []
  for i, part in enumerate(text.replace(CLOSE, OPEN).split(OPEN)):
    if i % 2:
      spans.append((len(plain), len(plain) + len(part)))
    plain += part
  return Rendered(plain, spans)
