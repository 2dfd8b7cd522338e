"""Graceful stop on SIGTERM, which precedes the preemption of a machine, and on Ctrl-C."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from ll3m.core import stderr

# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command resumes the run.
EXIT_CODE = 75
# What shells report for SIGINT. It differs from 75, on which scripts may restart a run.
INTERRUPTED = 130


class Stopped(Exception):
  """Stop request; raised only between steps, where the training state is consistent."""


class StopRequest:
  """Listener for SIGTERM and SIGINT; use as a context manager, on the main thread.

  Until `defer` is called, there is nothing to save and a signal ends the process at once, even
  during compilation, which runs no Python code on the main thread. After `defer`, a signal makes
  `check` raise `Stopped`, and a second SIGINT ends the process at once.

  Several processes must stop at the same step, which jax's coordination service ensures. It
  listens for SIGTERM itself, and this class queries it. The service ignores SIGINT, so this class
  sends it SIGTERM instead.

  Attributes:
    exit_code: Exit code for a process that has stopped, by the signal received.
  """

  def __init__(self, *, ends_process: bool = True):
    """Prepares a listener that is active within its `with` block.

    Args:
      ends_process: Whether SIGTERM or SIGINT before `defer`, and a second SIGINT, end the process.
        If False, SIGINT raises KeyboardInterrupt in both cases, and SIGTERM waits for a step.
    """
    self._ends_process = ends_process
    self.exit_code = EXIT_CODE
    self._asked = threading.Event()
    self._deferred = False
    self._interrupted = False
    self._several = jax.process_count() > 1
    self._undo = contextlib.ExitStack()

  def __enter__(self) -> "StopRequest":
    heard = [] if self._several else [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # shells ignore it in `command &`
      heard.append(signal.SIGINT)
    # The interpreter writes the number of each signal to the pipe at once, whatever the main thread
    # is doing. The handler itself must wait for the main thread.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    listener = threading.Thread(target=self._listen, args=(reading,), daemon=True)
    listener.start()
    # An ExitStack calls its callbacks in reverse order.
    self._undo.callback(os.close, reading)
    self._undo.callback(listener.join)
    self._undo.callback(os.close, writing)  # ends the listener
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    self._undo.callback(signal.set_wakeup_fd, before)
    for number in heard:
      handler = signal.signal(number, self._handle)
      self._undo.callback(signal.signal, number, handler or signal.SIG_DFL)
    return self

  def __exit__(self, *exception: Any) -> None:
    self._undo.close()

  def defer(self) -> None:
    """Makes signals wait for the next `check`; call once there may be something to save."""
    self._deferred = True

  def check(self, step: int | None = None) -> None:
    """Raises `Stopped` if a stop was requested.

    Args:
      step: Step that has just finished; None between steps, where several processes cannot agree
        to stop.

    Raises:
      Stopped: A stop was requested.
    """
    if self._several:
      asked = step is not None and multihost_utils.reached_preemption_sync_point(step)
    else:
      asked = self._asked.is_set()
    if asked:
      raise Stopped

  def _handle(self, number: int, frame: Any) -> None:
    """Handles a signal on the main thread, when that next runs Python code."""
    del frame
    if number == signal.SIGINT and not self._ends_process:
      if not self._deferred or self._interrupted:
        raise KeyboardInterrupt
      self._interrupted = True

  def _listen(self, pipe: int) -> None:
    while number := os.read(pipe, 1):
      if number[0] == signal.SIGINT:
        self._interrupt()
      elif number[0] == signal.SIGTERM:
        self._asked.set()
        if not self._deferred and self._ends_process:
          stderr.leave("stopped by SIGTERM before the first step", EXIT_CODE)

  def _interrupt(self) -> None:
    if not self._ends_process and (not self._deferred or self.exit_code == INTERRUPTED):
      return  # the handler raises
    if not self._deferred:
      stderr.leave("stopped by Ctrl-C before the first step", INTERRUPTED)
    if self.exit_code == INTERRUPTED:
      stderr.leave("stopped by Ctrl-C without saving; earlier checkpoints are intact", INTERRUPTED)
    self.exit_code = INTERRUPTED
    stderr.tell("stopping after this step and saving it; Ctrl-C again stops at once without saving")
    self._asked.set()
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
