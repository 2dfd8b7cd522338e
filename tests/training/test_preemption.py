"""Requests to stop by SIGTERM and Ctrl-C, and the clean-up after listening for them."""

import os
import signal
import socket
import threading
import time

import pytest

from ll3m.training.preemption import EXIT_CODE, Stopped, StopRequest


def descriptors() -> set[str]:
  return set(os.listdir("/proc/self/fd"))


def test_sigterm_requests_a_stop_and_all_handlers_are_restored():
  heard = []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append("before"))
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  wakeup = signal.set_wakeup_fd(theirs.fileno())
  try:
    opened, threads = descriptors(), set(threading.enumerate())
    with StopRequest() as stop:
      stop.defer()
      stop.check()
      os.kill(os.getpid(), signal.SIGTERM)
      deadline = time.monotonic() + 10
      with pytest.raises(Stopped):
        while time.monotonic() < deadline:
          stop.check()
          time.sleep(0.01)
    assert not heard and stop.exit_code == EXIT_CODE
    assert descriptors() == opened and set(threading.enumerate()) == threads
    os.kill(os.getpid(), signal.SIGTERM)  # handled by the previous handler
    assert heard == ["before"] and ours.recv(9) == bytes([signal.SIGTERM])
  finally:
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGTERM, before)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_requests_a_stop_and_is_answered_at_once(handler, capfd):
  """Ctrl-C stays ignored in the background of a script, where shells ignore SIGINT."""
  before = signal.signal(signal.SIGINT, handler)
  try:
    with StopRequest() as stop:
      stop.defer()
      os.kill(os.getpid(), signal.SIGINT)
      deadline = time.monotonic() + (10 if handler is signal.default_int_handler else 0.2)
      while stop.exit_code == EXIT_CODE and time.monotonic() < deadline:
        time.sleep(0.01)
      time.sleep(0.05)
      if handler is signal.SIG_IGN:
        stop.check()
      else:
        assert stop.exit_code == 130
        assert "Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(Stopped):
          stop.check()
    assert signal.getsignal(signal.SIGINT) is handler
  finally:
    signal.signal(signal.SIGINT, before)
