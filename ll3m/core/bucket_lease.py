"""A lock for object stores, which have none: an object that its holder keeps writing anew.

Writing only if an object is still the one that was read is all that these stores offer, and enough:
who holds the lease writes it every few seconds; whoever finds one that stays as it is for a minute
takes it over. That the holder is dead is seen at once where it ran on this machine.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorstore as ts
from absl import logging

# In seconds: how often a holder shows that it lives, and for how long it may fail to.
BEAT = 10.0
PATIENCE = 60.0

_ABSENT = b"\x02"  # TensorStore's generation of a key that does not exist
_BOOT, _PROCESSES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class HeldError(Exception):
  """Another job holds the lease; the message is who."""


@contextlib.contextmanager
def lease(
  store: ts.KvStore,
  key: str,
  *,
  lost: Callable[[], None],
  beat: float = BEAT,
  patience: float = PATIENCE,
) -> Iterator[None]:
  """Holds a lease, and shows in the background that its holder lives.

  Args:
    store: where; it must write conditionally.
    key: of the object.
    lost: called, on another thread, when somebody else has taken the lease over.
    beat: seconds between signs of life.
    patience: seconds without any after which a holder counts as dead.

  Raises:
    HeldError: another job holds it.
  """
  mine = {"who": f"process {os.getpid()} on {socket.gethostname()}", "pid": os.getpid()}
  mine |= {"machine": _machine(), "token": uuid.uuid4().hex}
  generation = _take(store, key, mine, patience)
  over = threading.Event()

  def live() -> None:
    nonlocal generation
    number = 0
    while not over.wait(beat):
      number += 1
      # A store that does not answer is asked again; who has taken over meanwhile is seen then.
      with contextlib.suppress(ValueError):
        found = _write(store, key, mine | {"beat": number}, generation)
        if found is None:
          holder, current = _read(store, key)
          if holder.get("token") != mine["token"]:
            lost()
            return
          found = current  # a write of ours whose answer did not arrive
        generation = found

  thread = threading.Thread(target=live, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join(beat)
    with contextlib.suppress(ValueError):  # it ends by itself where it cannot be deleted
      store.write(key, None, if_equal=generation).result()


def _take(store: ts.KvStore, key: str, mine: dict, patience: float) -> bytes:
  """Returns the generation under which the lease is ours."""
  holder, seen = _read(store, key)
  waited, since = False, time.monotonic()
  while True:
    if seen == _ABSENT or _is_dead(holder) or time.monotonic() - since > patience:
      if (generation := _write(store, key, mine, seen)) is not None:
        return generation
    elif not waited:
      waited = True
      logging.warning(
        "%s holds %s%s, or did: waiting for up to %.0f s for a sign of life",
        _name(holder), store.url, key, patience,
      )  # fmt: skip
    time.sleep(patience / 60)
    now, generation = _read(store, key)
    if now.get("token") == mine["token"]:  # a write of ours whose answer did not arrive
      return generation
    if generation not in (seen, _ABSENT):
      raise HeldError(_name(now))
    holder, seen = now, generation


def _name(holder: dict) -> str:
  return str(holder.get("who", "somebody"))


def _is_dead(holder: dict) -> bool:
  """Says whether a holder ran on this machine, since it was started, and does no more."""
  if not _machine() or holder.get("machine") != _machine():
    return False
  try:
    os.kill(int(holder["pid"]), 0)
  except ProcessLookupError:
    return True
  except (OSError, KeyError, ValueError):
    pass
  return False


def _machine() -> str:
  """Returns what names the processes whose numbers this one sees; "" if nothing does."""
  try:
    return f"{socket.gethostname()} {_BOOT.read_text().strip()} {os.readlink(_PROCESSES)}"
  except OSError:  # only Linux has these files
    return ""


def _read(store: ts.KvStore, key: str) -> tuple[dict, bytes]:
  """Returns what a lease says, and its generation."""
  found = store.read(key).result()
  try:
    holder = json.loads(found.value)
  except ValueError:
    holder = {}
  return holder if isinstance(holder, dict) else {}, found.stamp.generation


def _write(store: ts.KvStore, key: str, holder: dict, generation: bytes) -> bytes | None:
  """Writes a lease if it is still of this generation; returns the new one, or None if it is not."""
  text = json.dumps(holder).encode()
  return store.write(key, text, if_equal=generation).result().generation or None
