"""Examples that cannot be learnt from: why, and how they are counted."""

import collections

from absl import logging

_NAMED = 3  # examples in one message


class Unusable(ValueError):
  """An example that cannot be learnt from; the message is the reason, the same for its like."""


def require_unicode(text: str) -> str:
  """Returns the text, if it is one.

  JSON and command lines can name lone surrogates, which no UTF-8 file and no tokenizer can hold.

  Raises:
    Unusable: it is not.
  """
  try:
    text.encode()
  except UnicodeEncodeError:
    raise Unusable("not Unicode text") from None
  return text


class Skipped:
  """The examples that were left out.

  Attributes:
    counts: how many, by reason.
    first: the first few that differ, each as "place: reason".
  """

  def __init__(self, *, strict: bool = False):
    """Begins with none; if `strict`, there may be none."""
    self.counts: collections.Counter[str] = collections.Counter()
    self.first: list[str] = []
    self._strict = strict
    self._reported = 0

  def add(self, place: str, reason: str) -> None:
    """Counts an example.

    Args:
      place: where it is, "file:line" where that is known.
      reason: why it cannot be used, the same for its like.

    Raises:
      ValueError: none may be left out.
    """
    if self._strict:
      raise ValueError(f"{place}: {reason} (`strict`)")
    self.counts[reason] += 1
    named = f"{place}: {reason}"
    if len(self.first) < _NAMED and named not in self.first:
      self.first.append(named)

  def warn_and_add(self, place: str, reason: str) -> None:
    """Counts an example of a stream, and says so the first time: totals come only at the end."""
    first = not self.counts
    self.add(place, reason)
    if first:
      logging.warning("leaving out examples that cannot be used; the first: %s: %s", place, reason)
      self.mark_reported()

  def mark_reported(self) -> None:
    """Notes that the user has been told of all that is counted so far."""
    self._reported = self.counts.total()

  def describe_unreported(self) -> str:
    """Returns `describe()` for the end of a command; "" if it would only repeat a report."""
    return self.describe() if self.counts.total() > self._reported else ""

  def describe(self) -> str:
    """Returns how many there are, by reason, and the first of them; "" for none."""
    if not self.counts:
      return ""
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in self.counts.most_common())
    return f"skipped {self.counts.total():,}: {reasons}; the first: {'; '.join(self.first)}"
