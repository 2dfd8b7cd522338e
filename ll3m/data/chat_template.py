"""Chat templates: Jinja sources, rendered in the surroundings that transformers gives them."""

import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

# Enclose what a template marks with {% generation %}: noncharacters of Unicode, drawn anew in each
# process, so that no message holds them.
OPEN, CLOSE = ("".join(chr(0xFDD0 + secrets.randbelow(32)) for _ in range(12)) for _ in range(2))

# Names of a message's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def apply_template(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  special_tokens: Mapping[str, str],
  *,
  tools: Sequence[Any] | None = None,
  add_generation_prompt: bool = False,
) -> str:
  """Renders a conversation as `apply_chat_template(tokenize=False)` of transformers does.

  Args:
    template: The Jinja source.
    messages: The turns. Keys whose value is None count as absent, as in transformers.
    special_tokens: The names that the template may use ("bos_token", ...) and their text.
    tools: The JSON schemas of the functions that the assistant may call.
    add_generation_prompt: Whether to end with the header of an assistant turn.

  Returns:
    The text, with OPEN and CLOSE around what {% generation %} encloses.

  Raises:
    ValueError: the template refuses the messages.
  """
  try:
    return compile_template(template).render(
      messages=[_prepared(message) for message in messages],
      tools=tools,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **special_tokens,
    )
  except Exception as error:  # whatever a stranger's template makes Python raise
    raise ValueError(f"the chat template refuses the messages: {error}") from error


class TurnTokens(NamedTuple):
  """The added tokens that a template gives a conversation its structure with.

  Attributes:
    structure: Those around a user's turn, and those in `ends`.
    ends: Those right after what the assistant says.
  """

  structure: frozenset[str]
  ends: frozenset[str]


def find_turn_tokens(
  template: str, special_tokens: Mapping[str, str], added_tokens: Iterable[str]
) -> TurnTokens:
  """Finds the tokens that begin and end turns, by rendering a conversation.

  Whether an added token is flagged `special` says nothing about it: many folders add ChatML's
  markers without the flag. Tokens that a template writes only into an assistant's turn, as
  `<think>`, are content that a model learns to write, not structure.

  Args:
    template: The Jinja source.
    special_tokens: As for `apply_template`.
    added_tokens: The tokens that are found in text before it is cut into pieces.
  """
  # Runs of spaces or line breaks are added tokens of Gemma and Phi; templates contain them as text.
  visible = [token for token in added_tokens if token.strip().strip("▁")]
  if not visible:
    return TurnTokens(frozenset(), frozenset())
  pattern = re.compile("|".join(map(re.escape, sorted(visible, key=len, reverse=True))))
  system, question, answer = (
    {"role": role, "content": f"<<{role}>>"} for role in ("system", "user", "assistant")
  )

  def around(*messages: dict[str, str]) -> tuple[str, str]:
    for opening in ((), (system,)):  # some templates demand a system turn
      try:
        text = _unmarked(apply_template(template, [*opening, *messages], special_tokens))
      except ValueError:
        continue
      before, said, after = text.rpartition(messages[-1]["content"])
      return (before, after) if said else ("", "")
    return "", ""

  after = around(question, answer)[1].lstrip()
  ends = {match[0]} if (match := pattern.match(after)) else set()
  structure = {token for part in around(question) for token in pattern.findall(part)}
  return TurnTokens(frozenset(structure | ends), frozenset(ends))


def _unmarked(text: str) -> str:
  return text.replace(OPEN, "").replace(CLOSE, "")


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
  """Drops keys without a value, and gives reasoning every name that templates read it by."""
  message = {key: value for key, value in message.items() if value is not None}
  reasoning = next((message[key] for key in _REASONING if key in message), None)
  if reasoning is None:
    return message
  return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
  """`{% generation %} ... {% endgeneration %}`: marks what the assistant says."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_mark")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller: Any) -> str:
    return OPEN + caller() + CLOSE


@functools.lru_cache(maxsize=8)
def compile_template(template: str) -> jinja2.Template:
  """Compiles a template in a sandbox.

  Raises:
    jinja2.TemplateError: the source is no template.
  """

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
  return environment.from_string(template)
