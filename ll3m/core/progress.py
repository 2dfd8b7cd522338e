"""What commands show: bars for work measured in bytes, and aligned reports."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def byte_bar(total: int, description: str) -> tqdm:
  """Returns a bar of bytes and rate; outside a terminal, it is redrawn every ten seconds."""
  return tqdm(
    total=total,
    unit="B",
    unit_scale=True,
    unit_divisor=1024,
    desc=description,
    mininterval=0.1 if sys.stderr.isatty() else 10,
  )


def aligned(rows: Iterable[tuple[str, str]]) -> str:
  """Returns lines of a name and a text, with the texts in one column.

  Args:
    rows: Name, at most 11 characters, and text of each line.
  """
  return "\n".join(f"{name:<12}{text}" for name, text in rows)
