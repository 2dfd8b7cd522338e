"""Examples that cannot be learnt from: why, and how they are counted."""

import collections
from collections.abc import Mapping

from absl import logging


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


def skip(skipped: collections.Counter[str], label: str, reason: Unusable) -> None:
  """Counts an example that was left out, and says so the first time; totals come at the end."""
  if not skipped:
    logging.warning("%s: leaving out examples that cannot be used; the first: %s", label, reason)
  skipped[str(reason)] += 1


def describe(skipped: Mapping[str, int]) -> str:
  """Returns how many examples were left out, by reason; "" if none were."""
  reasons = collections.Counter(skipped).most_common()
  listing = ", ".join(f"{reason} ({count:,})" for reason, count in reasons)
  return f"skipped {sum(skipped.values()):,}: {listing}" if reasons else ""
