"""What listening for SIGTERM does, and what is left of it."""

import os
import signal
import socket
import threading
import time

import pytest

from ll3m.training.stopping import Stopped, StopRequest


def descriptors() -> set[str]:
  return set(os.listdir("/proc/self/fd"))


def test_a_request_is_heard_and_nothing_is_left_of_listening():
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
    assert not heard
    assert descriptors() == opened and set(threading.enumerate()) == threads
    os.kill(os.getpid(), signal.SIGTERM)  # heard by whom it was before
    assert heard == ["before"] and ours.recv(9) == bytes([signal.SIGTERM])
  finally:
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGTERM, before)
    ours.close()
    theirs.close()
