"""From new tokens to text, as they come."""

from collections.abc import Callable, Iterable, Sequence

# What a decoder shows for bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"
# Tokens before the first new one that are decoded with it: whether a word starts with a space,
# and how bytes join to characters, is only seen in context.
_CONTEXT = 8


class TextStream:
  """Turns tokens into pieces of text that join to the whole.

  Characters made of several tokens are held back until they are complete, so that every piece is
  valid on its own.
  """

  def __init__(self, decode: Callable[[Iterable[int]], str], prompt: Sequence[int]):
    """Args: the tokenizer's decode function; the tokens before the first new one."""
    self._decode = decode
    self._tokens = list(prompt[-_CONTEXT:])
    self._new = len(self._tokens)  # where the tokens begin whose text is not out yet

  def push(self, token: int) -> str:
    """Takes one token; returns the text that is complete by now, maybe none."""
    self._tokens.append(token)
    text = self._unseen()
    if not text or text.endswith(_INCOMPLETE):
      return ""
    self._tokens = self._tokens[max(0, self._new - _CONTEXT) :]
    self._new = len(self._tokens)
    return text

  def finish(self) -> str:
    """Returns what was held back, at the end of the text."""
    return self._unseen()

  def _unseen(self) -> str:
    seen = self._decode(self._tokens[: self._new])
    return self._decode(self._tokens)[len(seen) :]
