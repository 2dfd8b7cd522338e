"""Progress bars for work measured in bytes."""

import sys

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
