"""Incremental decoding of new tokens to text."""

from collections.abc import Callable, Collection, Iterable, Sequence

# Replacement character of a decoder for bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"
# Number of earlier tokens that are decoded together with new ones, because only the context shows
# whether a word starts with a space.
_CONTEXT = 8


class TextStream:
  """Incremental decoder, whose pieces of text concatenate to the decoding of all tokens.

  Text that later tokens may still change is held back: the bytes of an incomplete character, and a
  run of tokens that stand for one byte each (byte fallback), because decoders give replacement
  characters for a whole run if any byte in it is invalid.
  """

  def __init__(
    self,
    decode: Callable[[Iterable[int]], str],
    prompt: Sequence[int],
    *,
    byte_ids: Collection[int] = (),
    silent_ids: Collection[int] = (),
  ):
    """Starts after a prompt.

    Args:
      decode: The tokenizer's function from ids to text.
      prompt: Tokens before the first new one.
      byte_ids: Tokens that stand for one byte each.
      silent_ids: Tokens that `decode` omits.
    """
    self._decode = decode
    self._byte_ids, self._silent_ids = frozenset(byte_ids), frozenset(silent_ids)
    self._tokens = self._context([token for token in prompt if token not in self._silent_ids])
    self._shown = len(self._decode(self._tokens))  # characters of `_tokens` already returned

  def push(self, token: int) -> str:
    """Adds a token and returns the text that is now complete, which may be empty."""
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
    """Returns the text held back so far; call it after the last token."""
    return self._unseen()

  def _unseen(self) -> str:
    return self._decode(self._tokens)[self._shown :]

  def _context(self, tokens: list[int]) -> list[int]:
    """Returns the last tokens, starting at one that does not continue a run of bytes."""
    start = max(0, len(tokens) - _CONTEXT)
    while start and tokens[start] in self._byte_ids:
      start -= 1
    return tokens[start:]
