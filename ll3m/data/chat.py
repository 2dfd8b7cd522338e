"""Conversations rendered by the tokenizer's chat template, with loss on assistant turns only.

Text in messages never becomes a control token. Control strings in messages are marked before the
template is rendered, so that only those written by the template itself become control tokens.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ll3m.data.chat_template import CLOSE, OPEN, apply_template
from ll3m.data.skipped_examples import require_unicode
from ll3m.data.tokenizer import Tokenizer


class Rendered(NamedTuple):
  """A conversation as text.

  Attributes:
    text: Rendered text; control strings from messages have the marks of `Tokenizer.quote`.
    spans: Start and end of each trained part, in characters of `text`.
    is_only_answers: Whether all messages are the assistant's.
  """

  text: str
  spans: list[tuple[int, int]]
  is_only_answers: bool = False


def render(tokenizer: Tokenizer, messages: Any, tools: Any = None) -> Rendered:
  """Renders a conversation and finds the assistant's turns.

  If the template marks the turns with `{% generation %}`, its marks are used. Otherwise, a turn is
  the text that appears when its message is added to the messages before it, without the header
  with which the template starts an answer. The turn includes the token that ends it: the one that
  the template writes right after an answer, or else EOS, or else the template's last control token
  after the content. Without any, it ends at its last visible character.

  A template may omit the beginning of earlier answers, such as reasoning; the rest is trained.

  A turn whose message has `"weight": 0` is not trained.

  Args:
    tokenizer: Tokenizer with a chat template.
    messages: List of {"role": ..., "content": ...}. An assistant's message that calls functions
      may have `tool_calls` instead of content.
    tools: JSON schemas of the functions that the assistant may call: a list, or its JSON text.

  Raises:
    ValueError: There is no template, or the messages are malformed or not Unicode text, or the
      template refuses them, omits calls or tools, or rewrites earlier turns when later ones follow.
  """
  messages, tools = _checked(messages), _checked_tools(tools)
  answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
  if not answers:
    raise ValueError("messages has no assistant turn")
  if not any(_says_something(messages[i]) for i in answers):
    raise ValueError("no text to train on")
  trained = [i for i in answers if _weight(messages[i])]
  if not trained:
    raise ValueError("every assistant turn has weight 0")
  apply, messages = _renderer(tokenizer, tools), _quoted(tokenizer, messages)
  whole = apply(messages)
  _check_calls(apply, messages, tools, whole)
  only_answers = len(answers) == len(messages)
  if OPEN in whole:
    found = _unmark(whole)._replace(is_only_answers=only_answers)
    if len(trained) == len(answers):
      return found
    if len(found.spans) != len(answers):
      raise ValueError(
        f"the chat template marks {len(found.spans)} parts for {len(answers)} assistant turns, so "
        "it is unknown which part has weight 0"
      )
    spans = [span for i, span in zip(answers, found.spans, strict=True) if i in trained]
    return found._replace(spans=spans)
  turns = [_find_turn(tokenizer, apply, messages, whole, i) for i in trained]
  return Rendered(whole, turns, only_answers)


def encode_prompt(tokenizer: Tokenizer, messages: Any, tools: Any = None) -> list[int]:
  """Returns the token ids of a conversation for the assistant to continue.

  Raises:
    ValueError: See `render`.
  """
  messages, tools = _checked(messages), _checked_tools(tools)
  apply, messages = _renderer(tokenizer, tools), _quoted(tokenizer, messages)
  text = apply(messages, add_generation_prompt=True)
  return tokenizer.encode_rendered(_unmark(text).text)


def _renderer(tokenizer: Tokenizer, tools: list | None) -> Callable[..., str]:
  """Returns a function that renders messages in which control strings are marked.

  Raises:
    ValueError: The tokenizer has no template.
  """
  templates = tokenizer.chat_templates
  template = templates.get("tool_use") if tools else None
  template = template or templates.get("default")
  if not template:
    raise ValueError("the tokenizer has no chat template")
  quoted_tools = _quoted(tokenizer, tools)

  def apply(messages: Sequence[dict], *, tools: Any = quoted_tools, **options: bool) -> str:
    text = apply_template(template, messages, tokenizer.special_tokens, tools=tools, **options)
    return require_unicode(text)

  return apply


def _find_turn(
  tokenizer: Tokenizer, apply: Callable[..., str], messages: list[dict], whole: str, i: int
) -> tuple[int, int]:
  """Returns the start and end of the i-th message, an assistant's, in the rendered conversation."""
  upto = apply(messages[: i + 1]) if i + 1 < len(messages) else whole
  heads = (apply(messages[:i], add_generation_prompt=p) for p in (True, False))
  head = next((h for h in heads if upto.startswith(h)), None)
  if head is not None and whole.startswith(head):
    said = messages[i].get("content") or ""
    answer, is_ended = _answer(tokenizer, upto[len(head) :], said)
    for omitted in range(len(answer) if is_ended else 1):
      if whole.startswith(answer[omitted:], len(head)):
        return len(head), len(head) + len(answer) - omitted
  raise ValueError("the chat template rewrites earlier turns and has no {% generation %}")


def _answer(tokenizer: Tokenizer, turn: str, said: str) -> tuple[str, bool]:
  """Returns a turn without what follows its end, and whether a control token ends it.

  What follows, such as a line break, belongs to the template.
  """
  for ends in (
    tokenizer.turn_ends,
    [tokenizer.special_tokens["eos_token"]],
    tokenizer.control_tokens,
  ):
    end = max((turn.rfind(token) + len(token) for token in ends if token in turn), default=0)
    # A control token before the content is part of a header.
    if end and said.strip() in turn[:end]:
      return turn[:end], True
  return turn.rstrip(), False


def _checked(messages: Any) -> list[dict]:
  """Checks the form of messages and drops keys whose value is None, as transformers does."""
  if not isinstance(messages, list) or not messages:
    raise ValueError("messages is not a list of messages")
  found = []
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise ValueError("a message must have text as its role and content")
    content, calls = _joined(message.get("content")), message.get("tool_calls")
    # In the OpenAI API, the content of an answer that only calls functions is null.
    if not isinstance(content, str) and (content is not None or message["role"] != "assistant"):
      raise ValueError("a message must have text as its role and content")
    if calls and not isinstance(calls, list):
      raise ValueError("tool_calls is not a list")
    _weight(message)
    message = {**message, "content": content}
    found.append({key: value for key, value in message.items() if value is not None})
  return found


def _joined(content: Any) -> Any:
  """Returns the text of content that is a list of parts, as in the OpenAI API.

  Raises:
    ValueError: A part is not text.
  """
  if not isinstance(content, list):
    return content
  texts = []
  for part in content:
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", None):
      kind = part.get("type") if isinstance(part, dict) else type(part).__name__
      raise ValueError(f"content has a part of type {kind!r}; only text is supported")
    if not isinstance(part.get("text"), str):
      raise ValueError("content has a part without text")
    texts.append(part["text"])
  return "".join(texts)


def _checked_tools(tools: Any) -> list | None:
  if isinstance(tools, str) and tools.strip():  # JSON text: Arrow cannot hold differing schemas
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
  """Checks that the template renders tools and calls; many templates drop them silently.

  Raises:
    ValueError: The template drops tools or calls.
  """
  if tools and apply(messages, tools=None) == whole:
    raise ValueError("the chat template does not render tools")
  for i, message in enumerate(messages):
    if message.get("tool_calls"):
      without = {"content": ""} | {k: v for k, v in message.items() if k != "tool_calls"}
      try:
        lost = apply([*messages[:i], without, *messages[i + 1 :]]) == whole
      except ValueError:  # the template requires the calls
        continue
      if lost:
        raise ValueError("the chat template does not render tool_calls")


def _says_something(message: dict) -> bool:
  return bool(message.get("content", "").strip() or message.get("tool_calls"))


def _weight(message: dict) -> int:
  """Returns 1 if a message is trained, 0 if not."""
  weight = message.get("weight")
  if weight is None:
    return 1
  if weight not in (0, 1):
    raise ValueError("the weight of a message must be 0 or 1")
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
  """Converts the marks of `{% generation %}` to spans."""
  plain, spans = "", []
  for i, part in enumerate(text.replace(CLOSE, OPEN).split(OPEN)):
    if i % 2:
      spans.append((len(plain), len(plain) + len(part)))
    plain += part
  return Rendered(plain, spans)
