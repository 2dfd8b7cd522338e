"""Chat templates: Jinja sources, rendered in the same environment as in transformers."""

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

# Marks around the text inside {% generation %}. They consist of Unicode noncharacters, drawn at
# random in each process, so that no message contains them.
OPEN, CLOSE = ("".join(chr(0xFDD0 + secrets.randbelow(32)) for _ in range(12)) for _ in range(2))

# Keys of a message's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def apply_template(
  template: str,
  messages: Sequence[Mapping[str, Any]],
  special_tokens: Mapping[str, str],
  *,
  tools: Sequence[Any] | None = None,
  add_generation_prompt: bool = False,
) -> str:
  """Renders a conversation like `apply_chat_template(tokenize=False)` of transformers.

  Args:
    template: Jinja source.
    messages: Turns. Keys whose value is None count as absent, as in transformers.
    special_tokens: Texts of special tokens, by the names that the template may use ("bos_token",
      ...).
    tools: JSON schemas of the functions that the assistant may call.
    add_generation_prompt: Whether to end with the header of an assistant turn.

  Returns:
    The text, with OPEN and CLOSE around the parts inside {% generation %}.

  Raises:
    ValueError: The template refuses the messages.
  """
  try:
    return compile_template(template)(
      messages=[_prepared(message) for message in messages],
      tools=tools,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **special_tokens,
    )
  except Exception as error:  # a template can raise any exception
    raise ValueError(f"the chat template refuses the messages: {error}") from error


class TurnTokens(NamedTuple):
  """Added tokens with which a template structures a conversation.

  Attributes:
    structure: Tokens around a user's turn, and the tokens in `ends`.
    ends: Tokens right after the content of an assistant's turn.
  """

  structure: frozenset[str]
  ends: frozenset[str]


def find_turn_tokens(
  template: str, special_tokens: Mapping[str, str], added_tokens: Iterable[str]
) -> TurnTokens:
  """Finds the tokens that begin and end turns, by rendering a conversation.

  The flag `special` does not identify these tokens: many folders add ChatML's markers without it.
  Tokens that a template writes only inside an assistant's turn, such as `<think>`, are content
  that a model learns to generate, not structure.

  Args:
    template: Jinja source.
    special_tokens: See `apply_template`.
    added_tokens: Tokens that are matched in text before it is split into pieces.
  """
  # Runs of spaces or line breaks are added tokens of Gemma and Phi; in templates they are text.
  visible = [token for token in added_tokens if token.strip().strip("▁")]
  if not visible:
    return TurnTokens(frozenset(), frozenset())
  pattern = re.compile("|".join(map(re.escape, sorted(visible, key=len, reverse=True))))
  system, question, answer = (
    {"role": role, "content": f"<<{role}>>"} for role in ("system", "user", "assistant")
  )

  def around(*messages: dict[str, str]) -> tuple[str, str]:
    for opening in ((), (system,)):  # some templates require a system turn
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
  """Drops keys whose value is None and stores reasoning under every key that templates read."""
  message = {key: value for key, value in message.items() if value is not None}
  reasoning = next((message[key] for key in _REASONING if key in message), None)
  if reasoning is None:
    return message
  return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
  """Jinja tag `{% generation %} ... {% endgeneration %}`, which marks what the assistant says."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_mark")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller: Any) -> str:
    return OPEN + caller() + CLOSE


@functools.lru_cache(maxsize=8)
def compile_template(template: str) -> Callable[..., str]:
  """Compiles a template in a sandbox, to a function from its variables to the text.

  Raises:
    jinja2.TemplateError: The source is not a valid template.
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
  compiled = environment.from_string(template)
  known = dict(compiled.globals)

  def render(**variables: Any) -> str:
    # `compiled.render` would copy its globals from a chain of mappings, which takes longer than to
    # render a short conversation.
    context = compiled.new_context(known | variables, shared=True)
    return environment.concat(compiled.root_render_func(context))

  return render
