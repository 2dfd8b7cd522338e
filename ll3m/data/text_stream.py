"""From new tokens to text, as they come."""

from collections.abc import Callable, Collection, Iterable, Sequence

# What a decoder shows for bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"
# Tokens before the first new one that are decoded with it: whether a word starts with a space is
# only seen in context.
_CONTEXT = 8


class TextStream:
  """Turns tokens into pieces of text that join to the decoding of the whole.

  Text that later tokens may still change is held back: the bytes of a character that is not
  complete, and a run of tokens that stand for one byte each (byte fallback), because decoders give
  replacement characters for a whole run if any byte of it is wrong.
  """

  def __init__(
    self,
    decode: Callable[[Iterable[int]], str],
    prompt: Sequence[int],
    *,
    byte_ids: Collection[int] = (),
    silent_ids: Collection[int] = (),
  ):
    """Begins after a prompt.

    Args:
      decode: The tokenizer's function from ids to text.
      prompt: The tokens before the first new one.
      byte_ids: The tokens that stand for one byte each.
      silent_ids: The tokens that `decode` leaves out.
    """
    self._decode = decode
    self._byte_ids, self._silent_ids = frozenset(byte_ids), frozenset(silent_ids)
    self._tokens = self._context([token for token in prompt if token not in self._silent_ids])
    self._shown = len(self._decode(self._tokens))  # characters of `_tokens` that are out

  def push(self, token: int) -> str:
    """Takes one token; returns the text that is complete by now, maybe none."""
    if token in self._silent_ids:
      return ""
    self._tokens.append(token)
    if token in self._byte_ids:
      return ""
    text = self._unseen()
    if not text or text.endswith(_INCOMPLETE):
      return ""
    self._tokens = self._context(self._tokens)
    self._shown = len(self._decode(self._tokens))
    return text

  def finish(self) -> str:
    """Returns what was held back, at the end of the text."""
    return self._unseen()

  def _unseen(self) -> str:
    return self._decode(self._tokens)[self._shown :]

  def _context(self, tokens: list[int]) -> list[int]:
    """Returns the last tokens, from one that does not continue a run of bytes."""
    start = max(0, len(tokens) - _CONTEXT)
    while start and tokens[start] in self._byte_ids:
      start -= 1
    return tokens[start:]
