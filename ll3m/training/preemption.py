"""Stopping when asked to: SIGTERM, as sent before a machine is taken away, and Ctrl-C."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from ll3m.core import stderr

# sysexits.h calls it EX_TEMPFAIL: nothing is wrong, the same command resumes where this one ended.
EXIT_CODE = 75
# As shells report SIGINT. A script that starts a run again on 75 has to end when its user asks.
INTERRUPTED = 130


class Stopped(Exception):
  """Asked to stop; raised only where the state of training is whole."""


class StopRequest:
  """Listens for SIGTERM and SIGINT; use as a context manager, on the main thread.

  Until `defer` is called there is nothing to save, and the process ends at once, even inside of
  compiling, which lets no Python code run on its thread. After it, `check` raises `Stopped`, and a
  second SIGINT ends the process at once.

  Of several processes, all have to stop at the same step. jax's coordination service sees to that
  once it was initialised: it listens for SIGTERM itself, and this class only asks it. It knows
  nothing of SIGINT, which is passed on to it as SIGTERM.

  Attributes:
    exit_code: Exit code of a process that has stopped, by the signal that it heard.
  """

  def __init__(self, *, ends_process: bool = True):
    """Listens only within the `with` block.

    Args:
      ends_process: Whether to end the process where it cannot wait for a step: before `defer`, and
        at a second SIGINT. If not, SIGINT raises KeyboardInterrupt there, and SIGTERM waits.
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
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is of a shell's `command &`
      heard.append(signal.SIGINT)
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
    for number in heard:
      handler = signal.signal(number, self._handle)
      self._undo.callback(signal.signal, number, handler or signal.SIG_DFL)
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
    if self._several:
      asked = step is not None and multihost_utils.reached_preemption_sync_point(step)
    else:
      asked = self._asked.is_set()
    if asked:
      raise Stopped

  def _handle(self, number: int, frame: Any) -> None:
    """Runs on the main thread, once that runs Python code again."""
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
      stderr.leave("ended by Ctrl-C; the steps that were saved before are complete", INTERRUPTED)
    self.exit_code = INTERRUPTED
    stderr.tell("stopping after this step, which is saved; Ctrl-C again ends at once, unsaved")
    self._asked.set()
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
