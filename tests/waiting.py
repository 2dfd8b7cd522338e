"""Waiting for conditions that other processes fulfil."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
  """Waits until a condition holds; fails if that takes too long."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)
