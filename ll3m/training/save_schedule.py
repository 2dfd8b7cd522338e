"""When a run is saved: by steps, by time, and at its end."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

# Steps after which several processes compare clocks. Asking waits for the step that is under way,
# so it costs about what launching a step does, a few milliseconds in the time of ten steps.
_ASK_EVERY = 10


class SaveSchedule:
  """Decides after which steps to save; all processes get the same answer.

  Clocks differ between processes, which have to save the same step, so process 0's clock decides.
  """

  def __init__(self, total_steps: int, *, every_steps: int, every_minutes: float):
    """Starts the clock.

    Args:
      total_steps: Last step of the run, which is always saved.
      every_steps: Steps between checkpoints; 0 for none.
      every_minutes: Minutes from one checkpoint, of whatever reason, to the next; 0 for none.
    """
    self._total_steps = total_steps
    self._every_steps = every_steps
    self._seconds = 60 * every_minutes
    self.restart()

  def restart(self) -> None:
    """Starts the clock anew; call when a step is saved."""
    self._since = time.monotonic()

  def due(self, step: int) -> bool:
    """Says whether to save; all processes have to ask after every step."""
    if step == self._total_steps or (self._every_steps and step % self._every_steps == 0):
      return True
    if not self._seconds:
      return False
    late = time.monotonic() - self._since >= self._seconds
    if jax.process_count() == 1:
      return late
    return step % _ASK_EVERY == 0 and bool(multihost_utils.broadcast_one_to_all(np.bool_(late)))
