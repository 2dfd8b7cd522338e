"""Schedule of checkpoints: by steps, by time and at the end of the run."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

# Steps between broadcasts of process 0's decision. A broadcast waits for the step under way, so it
# costs about as much as launching a step: a few milliseconds in the time of ten steps.
_ASK_EVERY = 10


class SaveSchedule:
  """Decides after which steps to save, alike on all processes.

  All processes must save the same step but their clocks differ, so process 0's clock decides.
  """

  def __init__(self, total_steps: int, *, every_steps: int, every_minutes: float):
    """Starts the clock.

    Args:
      total_steps: Last step of the run, which is always saved.
      every_steps: Steps between checkpoints; 0 for none.
      every_minutes: Minutes since the last checkpoint of either kind; 0 for none.
    """
    self._total_steps = total_steps
    self._every_steps = every_steps
    self._seconds = 60 * every_minutes
    self.restart()

  def restart(self) -> None:
    """Restarts the clock; call when a step is saved."""
    self._since = time.monotonic()

  def due(self, step: int) -> bool:
    """Returns whether to save; all processes must call it after every step."""
    if step == self._total_steps or (self._every_steps and step % self._every_steps == 0):
      return True
    if not self._seconds:
      return False
    late = time.monotonic() - self._since >= self._seconds
    if jax.process_count() == 1:
      return late
    return step % _ASK_EVERY == 0 and bool(multihost_utils.broadcast_one_to_all(np.bool_(late)))
