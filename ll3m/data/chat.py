"""Conversations through a tokenizer's own chat template, with loss on assistant turns only.

What users wrote never becomes a control token: control strings inside messages are cut in two
before the template sees them, so that only the template's own count.
"""

import functools
import json
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from ll3m.data.tokenizer import CUT, Tokenizer, cut_controls
from ll3m.data.unusable import require_unicode

# Noncharacters, as CUT is.
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"
_NONCHARACTERS = str.maketrans("", "", CUT + _OPEN + _CLOSE)


class Rendered(NamedTuple):
  """A conversation as text."""

  text: str  # with marks where it must be cut before it is tokenised
  spans: list[tuple[int, int]]  # what the assistant says, in characters of `text`


def render(tokenizer: Tokenizer, messages: Any) -> Rendered:
  """Renders a conversation and finds what its assistant says.

  A template that marks this with `{% generation %}` is taken at its word. Else a turn is what
  appears when it is added to the conversation up to there, after the header that the template
  gives to start an answer, up to and with the token that ends it: EOS, else the template's last
  control token after what was said; where there is neither, up to the last visible character.

  Args:
    tokenizer: brings the template.
    messages: a list of {"role": ..., "content": ...}.

  Raises:
    ValueError: if there is no template, the messages are malformed or not Unicode text, or the
      template refuses them or rewrites earlier turns when later ones come.
  """
  messages = _checked(tokenizer, messages)
  whole = _apply(tokenizer, messages)
  if _OPEN in whole:
    return _unmark(whole)
  spans = []
  for i, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    upto = _apply(tokenizer, messages[: i + 1])
    heads = (_apply(tokenizer, messages[:i], add_generation_prompt=p) for p in (True, False))
    head = next((h for h in heads if upto.startswith(h)), None)
    if head is None or not whole.startswith(upto):
      raise ValueError("the chat template rewrites earlier turns and has no {% generation %}")
    turn = upto[len(head) :]
    spans.append((len(head), len(head) + _end(tokenizer, turn, message["content"])))
  return Rendered(whole, spans)


def _end(tokenizer: Tokenizer, turn: str, said: str) -> int:
  """Returns where a turn ends; what follows, as a line break, belongs to the template."""
  eos = tokenizer.special_tokens.get("eos_token")
  ends = [eos] if eos in turn else tokenizer.control_tokens
  end = max((turn.rfind(token) + len(token) for token in ends if token in turn), default=0)
  # A control token before what was said is part of a header.
  return end if end and said.strip() in turn[:end] else len(turn.rstrip())


def encode(tokenizer: Tokenizer, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
  """Tokenises a conversation.

  Returns:
    ids int32 [n], and 1 for the tokens that begin inside a span, else 0, int32 [n].
  """
  ids, starts, base = [], [], 0
  for piece in rendered.text.split(CUT):
    piece_ids, offsets = tokenizer.encode_template(piece)
    ids += piece_ids
    starts += [base + start for start, _ in offsets]
    base += len(piece) + len(CUT)
  loss = [int(any(a <= start < b for a, b in rendered.spans)) for start in starts]
  return np.array(ids, np.int32), np.array(loss, np.int32)


def encode_prompt(tokenizer: Tokenizer, messages: Any) -> list[int]:
  """Returns the ids of a conversation that the assistant is to continue.

  Raises:
    ValueError: as `render`.
  """
  text = _apply(tokenizer, _checked(tokenizer, messages, answered=False),
                add_generation_prompt=True)  # fmt: skip
  return encode(tokenizer, Rendered(_strip_marks(text), []))[0].tolist()


def _checked(tokenizer: Tokenizer, messages: Any, *, answered: bool = True) -> list[dict]:
  """Returns the messages with control strings cut."""
  if not tokenizer.chat_template:
    raise ValueError("the tokenizer has no chat template")
  if not isinstance(messages, list) or not messages:
    raise ValueError("messages is not a list of messages")
  for message in messages:
    if not isinstance(message, dict) or not all(
      isinstance(message.get(key), str) for key in ("role", "content")
    ):
      raise ValueError("a message lacks its role or content as text")
  if answered and not any(message["role"] == "assistant" for message in messages):
    raise ValueError("messages has no assistant turn")

  def cut(text: str) -> str:
    return cut_controls(text.translate(_NONCHARACTERS), tokenizer.control_tokens)

  return [message | {key: cut(message[key]) for key in ("role", "content")} for message in messages]


def _apply(
  tokenizer: Tokenizer, messages: list[dict], *, add_generation_prompt: bool = False
) -> str:
  try:
    text = _compile(tokenizer.chat_template).render(
      messages=messages,
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **tokenizer.special_tokens,
    )
  except (jinja2.TemplateError, TypeError) as error:
    raise ValueError(f"the chat template refuses the messages: {error}") from error
  return require_unicode(text)


def _strip_marks(text: str) -> str:
  return text.replace(_OPEN, "").replace(_CLOSE, "")


def _unmark(text: str) -> Rendered:
  """Turns the marks of `{% generation %}` into spans."""
  plain, spans = "", []
  for i, part in enumerate(text.replace(_CLOSE, _OPEN).split(_OPEN)):
    if i % 2:
      spans.append((len(plain), len(plain) + len(part)))
    plain += part
  return Rendered(plain, spans)


class _Generation(jinja2.ext.Extension):
  """`{% generation %} ... {% endgeneration %}`: marks what the assistant says."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_mark")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller: Any) -> str:
    return _OPEN + caller() + _CLOSE


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
  """Compiles a template in the surroundings that transformers gives it."""

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
  return environment.from_string(template)
