"""Acquiring, renewing and losing a lease."""

import contextlib
import json
import subprocess
import sys
import threading
import time

import pytest
import tensorstore as ts

from ll3m.core import bucket_lease as lease_module
from ll3m.core.bucket_lease import HeldError, lease

KEY = ".claim"
PATIENCE = 0.3


@pytest.fixture
def store() -> ts.KvStore:
  """TensorStore's in-memory store, which supports conditional writes as Google's does."""
  return ts.KvStore.open("memory://run/").result()


@pytest.fixture
def lost() -> threading.Event:
  return threading.Event()


@pytest.fixture
def hold(lost):
  def hold(store):
    return lease(store, KEY, lost=lost.set, beat=PATIENCE / 6, patience=PATIENCE)

  return hold


def left_by(store, **holder) -> None:
  store.write(KEY, json.dumps({"who": "process 7 on there"} | holder)).result()


def test_held_lease_is_refused_to_others_with_the_holders_name(store, hold, lost, caplog):
  with hold(store):
    time.sleep(2 * PATIENCE)  # renewals keep it
    with pytest.raises(HeldError, match=r"^process \d+ on "), hold(store):
      pass
    assert "memory://run/.claim" in caplog.text and "waiting" in caplog.text
  assert not lost.is_set()
  assert store.read(KEY).result().state == "missing"
  with hold(store):  # without waiting
    pass


def test_only_one_of_many_simultaneous_jobs_acquires_the_lease(store, hold):
  held, refused = [], []
  ready, done = threading.Barrier(5), threading.Barrier(5)

  def job(number):
    ready.wait()
    try:
      with hold(store):
        held.append(number)
        done.wait(10)
    except HeldError:
      refused.append(number)
      done.wait(10)

  jobs = [threading.Thread(target=job, args=(n,)) for n in range(5)]
  for thread in jobs:
    thread.start()
  for thread in jobs:
    thread.join()
  assert len(held) == 1 and len(refused) == 4


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff"])
def test_lease_that_is_not_renewed_is_taken_over(store, hold, content):
  left_by(store, machine="another", pid=1)
  if content is not None:  # contents that we never write
    store.write(KEY, content).result()
  start = time.monotonic()
  with hold(store):
    assert PATIENCE < time.monotonic() - start < 3 * PATIENCE
    assert json.loads(store.read(KEY).result().value)["who"] != "process 7 on there"


def test_lease_of_an_exited_process_on_this_machine_is_taken_over_at_once(store, hold):
  ended = subprocess.Popen([sys.executable, "-c", ""])
  ended.wait()
  left_by(store, machine=lease_module._machine(), pid=ended.pid)
  start = time.monotonic()
  with hold(store):
    assert time.monotonic() - start < PATIENCE / 2


@pytest.mark.parametrize("missing", [("_BOOT", "gone"), None])
def test_lease_of_a_live_or_unknown_process_must_expire(store, hold, monkeypatch, missing):
  with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as lives:
    left_by(store, machine=lease_module._machine(), pid=lives.pid)
    if missing:  # only Linux has a boot id
      monkeypatch.setattr(lease_module, "_BOOT", lease_module.Path(missing[1]))
      left_by(store, machine="", pid=2**22 + 1)
    start = time.monotonic()
    with hold(store):
      assert time.monotonic() - start > PATIENCE
    lives.communicate(b"\n")


def test_holder_that_loses_the_lease_is_notified_and_does_not_retake_it(store, hold, lost):
  with hold(store):
    left_by(store, token="another's")
    assert lost.wait(10 * PATIENCE)
  assert json.loads(store.read(KEY).result().value)["token"] == "another's"


class Unreliable:
  """A store that loses the response to every other write, whether or not it made the write."""

  def __init__(self, store: ts.KvStore):
    self._store, self.writes, self.url = store, 0, store.url

  def read(self, key):
    return self._store.read(key)

  def write(self, key, value, if_equal):
    self.writes += 1
    kind = self.writes % 4
    done = self._store.write(key, value, if_equal=if_equal) if kind != 3 else None
    if kind % 2 and self.writes > 1:
      raise ValueError("no answer")
    return done


def test_lost_responses_do_not_lose_the_lease(store, hold, lost):
  unreliable = Unreliable(store)
  with hold(unreliable):
    deadline = time.monotonic() + 20 * PATIENCE
    while unreliable.writes < 12:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    with contextlib.suppress(HeldError), hold(store):
      pytest.fail("the lease was free")
  assert not lost.is_set()
