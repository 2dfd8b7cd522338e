"""Unusable examples: the reasons, and a counter of those that are skipped."""

import collections

from absl import logging

_NAMED = 3  # examples in one message


class Unusable(ValueError):
  """An example that cannot be trained on; the message is the reason under which it is counted."""


def require_unicode(text: str) -> str:
  """Returns the text if it is valid Unicode.

  JSON and command lines can contain lone surrogates, which UTF-8 and tokenizers cannot represent.

  Raises:
    Unusable: The text contains lone surrogates.
  """
  try:
    text.encode()
  except UnicodeEncodeError:
    raise Unusable("not Unicode text") from None
  return text


class Skipped:
  """Counter of skipped examples.

  Attributes:
    counts: Number of skipped examples, by reason.
    first: First few different examples, each as "place: reason".
  """

  def __init__(self, *, strict: bool = False):
    """Starts with no examples; if `strict`, adding an example raises an error."""
    self.counts: collections.Counter[str] = collections.Counter()
    self.first: list[str] = []
    self._strict = strict
    self._reported = 0

  def add(self, place: str, reason: str) -> None:
    """Counts an example.

    Args:
      place: Location of the example, "file:line" if known.
      reason: Why the example is unusable; examples with the same reason are counted together.

    Raises:
      ValueError: No example may be skipped (`strict`).
    """
    if self._strict:
      raise ValueError(f"{place}: {reason} (`strict`)")
    self.counts[reason] += 1
    named = f"{place}: {reason}"
    if len(self.first) < _NAMED and named not in self.first:
      self.first.append(named)

  def merge(self, other: "Skipped") -> None:
    """Adds the examples of another counter, which have been reported."""
    self.counts += other.counts
    self.first += other.first[: _NAMED - len(self.first)]
    self._reported += other.counts.total()

  def fresh(self) -> "Skipped":
    """Returns a counter without examples, for one of several sources."""
    return Skipped(strict=self._strict)

  def warn_and_add(self, place: str, reason: str) -> None:
    """Counts an example of a stream and logs the first, as totals are logged only at the end."""
    first = not self.counts
    self.add(place, reason)
    if first:
      logging.warning("skipping unusable examples; the first: %s: %s", place, reason)
      self.mark_reported()

  def mark_reported(self) -> None:
    """Records that all examples counted so far have been reported to the user."""
    self._reported = self.counts.total()

  def describe_unreported(self) -> str:
    """Returns `describe()` for the end of a command, or "" if all examples have been reported."""
    return self.describe() if self.counts.total() > self._reported else ""

  def describe(self) -> str:
    """Returns the number of examples by reason, and the first of them, or "" if there are none."""
    if not self.counts:
      return ""
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in self.counts.most_common())
    return f"skipped {self.counts.total():,}: {reasons}; the first: {'; '.join(self.first)}"
