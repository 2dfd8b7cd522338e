"""A lease that serves as a lock in object stores: its holder keeps rewriting one object.

Object stores have no locks, but they have conditional writes, which succeed only if the object has
not changed since it was read. These suffice: the holder rewrites the object every few seconds, and
anyone who sees it unchanged for a minute may take it over. If the holder ran on this machine, its
death is detected at once.
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

# Seconds between renewals, and seconds without a renewal after which a lease may be taken over.
BEAT = 10.0
PATIENCE = 60.0

_ABSENT = b"\x02"  # TensorStore's generation for a key that does not exist
_BOOT, _PROCESSES = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class HeldError(Exception):
  """Another job holds the lease; the message names the holder."""


@contextlib.contextmanager
def lease(
  store: ts.KvStore,
  key: str,
  *,
  lost: Callable[[], None],
  beat: float = BEAT,
  patience: float = PATIENCE,
) -> Iterator[None]:
  """Holds a lease and renews it in the background.

  Args:
    store: Key-value store of the lease; it must support conditional writes.
    key: Key of the lease.
    lost: Function that is called, on another thread, when another job has taken over the lease.
    beat: Seconds between renewals.
    patience: Seconds without a renewal after which a holder counts as dead.

  Raises:
    HeldError: Another job holds the lease.
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
      # If the store does not answer, the next iteration tries again, and detects a takeover.
      with contextlib.suppress(ValueError):
        found = _write(store, key, mine | {"beat": number}, generation)
        if found is None:
          holder, current = _read(store, key)
          if holder.get("token") != mine["token"]:
            lost()
            return
          found = current  # our own write, whose response was lost
        generation = found

  thread = threading.Thread(target=live, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join(beat)
    with contextlib.suppress(ValueError):  # a lease that cannot be deleted expires
      store.write(key, None, if_equal=generation).result()


def _take(store: ts.KvStore, key: str, mine: dict, patience: float) -> bytes:
  """Acquires the lease once it is free or has expired; returns its generation."""
  holder, seen = _read(store, key)
  waited, since = False, time.monotonic()
  while True:
    if seen == _ABSENT or _is_dead(holder) or time.monotonic() - since > patience:
      if (generation := _write(store, key, mine, seen)) is not None:
        return generation
    elif not waited:
      waited = True
      logging.warning(
        "%s may still hold %s%s; waiting up to %.0f s for a renewal",
        _name(holder), store.url, key, patience,
      )  # fmt: skip
    time.sleep(patience / 60)
    now, generation = _read(store, key)
    if now.get("token") == mine["token"]:  # our own write, whose response was lost
      return generation
    if generation not in (seen, _ABSENT):
      raise HeldError(_name(now))
    holder, seen = now, generation


def _name(holder: dict) -> str:
  return str(holder.get("who", "an unknown job"))


def _is_dead(holder: dict) -> bool:
  """Returns whether a holder ran on this machine, since its last boot, and has exited."""
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
  """Returns an identifier of this boot and PID namespace; "" if there is none."""
  try:
    return f"{socket.gethostname()} {_BOOT.read_text().strip()} {os.readlink(_PROCESSES)}"
  except OSError:  # only Linux has these files
    return ""


def _read(store: ts.KvStore, key: str) -> tuple[dict, bytes]:
  """Returns the contents of a lease and its generation."""
  found = store.read(key).result()
  try:
    holder = json.loads(found.value)
  except ValueError:
    holder = {}
  return holder if isinstance(holder, dict) else {}, found.stamp.generation


def _write(store: ts.KvStore, key: str, holder: dict, generation: bytes) -> bytes | None:
  """Writes a lease if it still has this generation; returns the new generation, or None."""
  text = json.dumps(holder).encode()
  return store.write(key, text, if_equal=generation).result().generation or None
