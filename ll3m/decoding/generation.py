"""Continues prompts with text, using an engine and a tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ll3m.data.text_stream import TextStream
from ll3m.data.tokenizer import Tokenizer
from ll3m.decoding.engine import GREEDY, Engine
from ll3m.decoding.sampling import Sampling


class Completion(NamedTuple):
  """The continuation of a prompt.

  Attributes:
    text: The new text.
    tokens: The ids of the new tokens, including the stop token.
    ended: Whether a stop token ended the text, rather than the limit of new tokens.
  """

  text: str
  tokens: list[int]
  ended: bool


class Piece(NamedTuple):
  """The text that a new token adds to a row.

  Attributes:
    row: The index of the prompt.
    token: The token's id; None at the end of a row, for text that was held back.
    text: The text completed by the token; may be empty.
  """

  row: int
  token: int | None
  text: str


def stream_text(
  engine: Engine,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  seeds: Sequence[int] | None = None,
  watch: Callable[[Iterator], Iterator] = lambda steps: steps,
) -> Iterator[Piece]:
  """Continues a batch of prompts, token by token.

  Args:
    engine: The model.
    tokenizer: The tokenizer of the prompts.
    prompts: The token ids of each row.
    max_new_tokens: The maximum number of new tokens per row.
    sampling: The sampling settings.
    seeds: The seed of each row; see `Engine.stream`.
    watch: Function that wraps the engine's iterator of steps, for example to time them.

  Raises:
    ValueError: The model cannot serve the request.
  """
  steps = engine.stream(
    prompts,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    seeds=seeds,
    stop_tokens=tokenizer.stop_ids,
  )
  return _pieces(tokenizer, prompts, watch(steps))


def _pieces(
  tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], steps: Iterator
) -> Iterator[Piece]:
  # Control tokens have no text, whether or not they are flagged as special. An ordinary word that
  # the model's files declare a stop token is shown.
  ends = set(tokenizer.stop_ids) & set(tokenizer.control_ids)
  streams = [
    TextStream(
      tokenizer.decode, prompt, byte_ids=tokenizer.byte_ids, silent_ids=tokenizer.silent_ids
    )
    for prompt in prompts
  ]
  for step in steps:
    for row, token in enumerate(step):
      if token is not None:
        yield Piece(row, token, "" if token in ends else streams[row].push(token))
  for row, stream in enumerate(streams):
    yield Piece(row, None, stream.finish())


def complete(
  engine: Engine,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  on_text: Callable[[str], Any] = lambda text: None,
  **options: Any,
) -> list[Completion]:
  """Continues a batch of prompts until every row has ended.

  Args:
    engine: The model.
    tokenizer: The tokenizer of the prompts.
    prompts: The token ids of each row.
    on_text: Function called with each new piece of text; for a single prompt.
    **options: Keyword arguments of `stream_text`.

  Raises:
    ValueError: The model cannot serve the request.
  """
  texts: list[list[str]] = [[] for _ in prompts]
  tokens: list[list[int]] = [[] for _ in prompts]
  for row, token, text in stream_text(engine, tokenizer, prompts, **options):
    texts[row].append(text)
    if token is not None:
      tokens[row].append(token)
    if text:
      on_text(text)
  return [
    Completion("".join(text), row, row[-1] in tokenizer.stop_ids)
    for text, row in zip(texts, tokens, strict=True)
  ]
