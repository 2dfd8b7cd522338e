"""Stopping when the scheduler asks for it: SIGTERM, as sent before a machine is taken away."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from ll3m.core import stderr

# sysexits.h calls it EX_TEMPFAIL: nothing is wrong, the same command goes on where this one ended.
EXIT_CODE = 75


class Stopped(Exception):
  """Asked to stop; raised only where the state of training is whole."""


class StopRequest:
  """Listens for SIGTERM; use as a context manager, on the main thread.

  Until `defer` is called there is nothing to save, and the process ends at once, even inside of
  compiling, which lets no Python code run on its thread. After it, `check` raises `Stopped`.

  Of several processes, all have to stop at the same step. jax's coordination service sees to that
  once it was initialised: it listens for SIGTERM itself, and this class only asks it.
  """

  def __init__(self):
    """Listens only within the `with` block."""
    self._asked = threading.Event()
    self._deferred = False
    self._undo = contextlib.ExitStack()

  def __enter__(self) -> "StopRequest":
    if jax.process_count() == 1:
      # The interpreter writes each signal's number to the pipe as it comes in, whatever the main
      # thread is doing; the handler itself has to wait for that thread.
      reading, writing = os.pipe()
      os.set_blocking(writing, False)
      listener = threading.Thread(target=self._listen, args=(reading,), daemon=True)
      listener.start()
      # What is called last is undone first.
      self._undo.callback(os.close, reading)
      self._undo.callback(listener.join)
      self._undo.callback(os.close, writing)  # which ends the listener
      before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
      self._undo.callback(signal.set_wakeup_fd, before)
      handler = signal.signal(signal.SIGTERM, lambda *_: None)
      self._undo.callback(signal.signal, signal.SIGTERM, handler or signal.SIG_DFL)
    return self

  def __exit__(self, *exception: Any) -> None:
    self._undo.close()

  def defer(self) -> None:
    """From now on there may be something to save."""
    self._deferred = True

  def check(self, step: int | None = None) -> None:
    """Stops here if it was asked for.

    Args:
      step: that was just made; None between steps, where several processes cannot agree to stop.

    Raises:
      Stopped: it was.
    """
    if jax.process_count() == 1:
      asked = self._asked.is_set()
    else:
      asked = step is not None and multihost_utils.reached_preemption_sync_point(step)
    if asked:
      raise Stopped

  def _listen(self, pipe: int) -> None:
    while number := os.read(pipe, 1):
      if number[0] == signal.SIGTERM:
        self._asked.set()
        if not self._deferred:
          stderr.leave("stopped by SIGTERM before the first step", EXIT_CODE)
