"""Who holds a lease, for how long, and who is told."""

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
  """TensorStore's own, in memory: it writes conditionally, as Google's does."""
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


def test_while_it_is_held_another_one_is_refused_and_told_by_whom(store, hold, lost, caplog):
  with hold(store):
    time.sleep(2 * PATIENCE)  # signs of life keep it
    with pytest.raises(HeldError, match=r"^process \d+ on "), hold(store):
      pass
    assert "memory://run/.claim" in caplog.text and "waiting for up to" in caplog.text
  assert not lost.is_set()
  assert store.read(KEY).result().state == "missing"
  with hold(store):  # at once
    pass


def test_of_many_at_once_one_gets_it(store, hold):
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
def test_a_holder_that_gives_no_sign_of_life_is_replaced_in_time(store, hold, content):
  left_by(store, machine="another", pid=1)
  if content is not None:  # what we would never write
    store.write(KEY, content).result()
  start = time.monotonic()
  with hold(store):
    assert PATIENCE < time.monotonic() - start < 3 * PATIENCE
    assert json.loads(store.read(KEY).result().value)["who"] != "process 7 on there"


def test_a_process_that_has_ended_on_this_machine_is_replaced_at_once(store, hold):
  ended = subprocess.Popen([sys.executable, "-c", ""])
  ended.wait()
  left_by(store, machine=lease_module._machine(), pid=ended.pid)
  start = time.monotonic()
  with hold(store):
    assert time.monotonic() - start < PATIENCE / 2


@pytest.mark.parametrize("missing", [("_BOOT", "gone"), None])
def test_one_that_lives_or_cannot_be_looked_for_is_waited_for(store, hold, monkeypatch, missing):
  with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as lives:
    left_by(store, machine=lease_module._machine(), pid=lives.pid)
    if missing:  # no machine but Linux says so
      monkeypatch.setattr(lease_module, "_BOOT", lease_module.Path(missing[1]))
      left_by(store, machine="", pid=2**22 + 1)
    start = time.monotonic()
    with hold(store):
      assert time.monotonic() - start > PATIENCE
    lives.communicate(b"\n")


def test_who_loses_it_is_told_and_does_not_take_it_back(store, hold, lost):
  with hold(store):
    left_by(store, token="another's")
    assert lost.wait(10 * PATIENCE)
  assert json.loads(store.read(KEY).result().value)["token"] == "another's"


class Unreliable:
  """A store whose answers get lost: of every other write, whether it was made or not."""

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


def test_answers_that_get_lost_do_not_lose_the_lease(store, hold, lost):
  unreliable = Unreliable(store)
  with hold(unreliable):
    deadline = time.monotonic() + 20 * PATIENCE
    while unreliable.writes < 12:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    with contextlib.suppress(HeldError), hold(store):
      pytest.fail("it was free")
  assert not lost.is_set()
