"""The processes of one run on several hosts: they meet, compare their flags, and watch each other.

jax.distributed connects the devices. What it does not do is say who is missing: a process that does
not come, or dies, makes the others abort with a C++ stack trace or wait for ever in a collective.
So every process also keeps a plain TCP connection to process 0, one port above the coordinator's:
there the flags are compared before anything is computed, and its end is how the others learn at
once that a process has died, and which.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ll3m.core import flags

# Flags that have to differ between processes.
_OWN = ("jax_distributed.process_id",)
# How long a process that fails waits for the others to have read why, in seconds.
_LAST_WORD = 1.0


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
  """`--jax_distributed.*`."""

  coordinator_address: str | None = flags.option(
    None,
    "HOST:PORT at which process 0 listens, for a run of several processes; it uses the next port "
    "too.",
  )
  num_processes: int | None = flags.option(None, "How many processes the run has.")
  process_id: int | None = flags.option(None, "Which of them this is, from 0.")
  auto: bool = flags.option(
    False, "Find these three out from the TPU's or the cluster's environment."
  )
  timeout: int = flags.option(
    300, "Seconds after which a process that does not come, or does not answer, is given up."
  )

  def __post_init__(self):
    given = [n for n in ("coordinator_address", "num_processes", "process_id")
             if getattr(self, n) is not None]  # fmt: skip
    if self.auto and given:
      raise ValueError(f"auto finds {given[0]} out by itself: give one or the other")
    if given and len(given) < 3:
      raise ValueError(
        f"{given[0]} is given: coordinator_address, num_processes and process_id go together"
      )
    if self.timeout < 1:
      raise ValueError(f"timeout must be at least 1, got {self.timeout}")
    if given:
      host, _, port = self.coordinator_address.rpartition(":")
      if not host or not port.isdigit():
        raise ValueError(f"coordinator_address must be HOST:PORT, got {self.coordinator_address!r}")
      if not 0 <= self.process_id < self.num_processes:
        raise ValueError(
          f"process_id must be within 0..{self.num_processes - 1}, got {self.process_id}"
        )


@contextlib.contextmanager
def joined(config: ProcessesConfig, settings: Mapping[str, Any]) -> Iterator[None]:
  """Joins the run's processes while it is open; does nothing for a run of one.

  If a process fails or dies meanwhile, all others end with a sentence that names it.

  Args:
    config: `--jax_distributed.*`.
    settings: every flag, which all processes must have alike.

  Raises:
    ValueError: a process does not come in time, or was started with other flags.
  """
  if config.coordinator_address is None and not config.auto:
    yield
    return
  address, process, count = config.coordinator_address, config.process_id, config.num_processes
  if config.auto:
    jax.distributed.initialize(initialization_timeout=config.timeout)
    # jax tells what it found out nowhere else.
    from jax._src.distributed import global_state

    address, process, count = (
      global_state.coordinator_address, jax.process_index(), jax.process_count()
    )  # fmt: skip
  line = _meet(address, process, count, config.timeout, settings)
  if not config.auto:
    jax.distributed.initialize(
      address,
      count,
      process,
      initialization_timeout=config.timeout,
      # Ours comes first, and says more.
      heartbeat_timeout_seconds=10 + 2 * config.timeout,
    )
  line.watch()
  try:
    yield
  except Exception as error:
    line.say({"failed": " ".join(str(error).split()) or type(error).__name__})
    time.sleep(_LAST_WORD)
    raise
  line.say({"bye": True})


class _Peer:
  """One end of a connection: JSON objects, one a line; empty lines are signs of life."""

  def __init__(self, connection: socket.socket, timeout: float):
    connection.settimeout(timeout)
    self.name = ""
    self._connection = connection
    self._file = connection.makefile("r", encoding="utf-8")
    self._lock = threading.Lock()

  def send(self, message: Mapping[str, Any] | None) -> None:
    """Sends an object, or a sign of life; a peer that is gone is noticed by who reads."""
    text = "\n" if message is None else json.dumps(message) + "\n"
    with self._lock, contextlib.suppress(OSError):
      self._connection.sendall(text.encode())

  def close(self) -> None:
    """Ends the connection."""
    self._file.close()
    self._connection.close()

  def receive(self) -> dict[str, Any] | None:
    """Returns the next object; None if the connection has ended.

    Raises:
      TimeoutError: no sign of life for too long.
    """
    try:
      for line in self._file:
        if line.strip():
          return json.loads(line)
    except TimeoutError:
      raise
    except (OSError, ValueError):
      pass
    return None


class _Line:
  """The connections of one process: process 0 has one to every other, these have one to it."""

  def __init__(self, peers: list[_Peer], timeout: float):
    self._peers, self._timeout = peers, timeout
    self._over = False

  def watch(self) -> None:
    """Starts to listen, and to give signs of life, in the background."""
    for peer in self._peers:
      threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
    threading.Thread(target=self._live, daemon=True).start()

  def say(self, message: Mapping[str, Any]) -> None:
    """Tells all peers; after it nothing that they do matters to this process."""
    self._over = True
    for peer in self._peers:
      peer.send(message)

  def _live(self) -> None:
    while not self._over:
      for peer in self._peers:
        peer.send(None)
      time.sleep(self._timeout / 4)

  def _listen(self, peer: _Peer) -> None:
    try:
      message = peer.receive()
    except TimeoutError:
      reason = f"{peer.name} has given no sign of life for {self._timeout:.0f} s"
    else:
      if message is not None and "bye" in message:
        return
      if message is None:
        reason = f"{peer.name} has died"
      elif "failed" in message:
        reason = f"{peer.name} has failed: {message['failed']}"
      else:
        reason = message["error"]
    if not self._over:
      self.say({"error": reason})
      # The other threads wait in a collective, where no exception reaches them.
      os.write(sys.stderr.fileno(), f"error: {reason}\n".encode())
      os._exit(1)


def _meet(
  address: str, process: int, count: int, timeout: float, settings: Mapping[str, Any]
) -> _Line:
  host, _, port = address.rpartition(":")
  mine = {
    "process": process,
    "host": socket.gethostname(),
    "flags": {k: repr(v) for k, v in settings.items() if k not in _OWN},
  }
  if process == 0:
    return _receive_all(int(port) + 1, count, timeout, mine)
  return _call(host.strip("[]"), int(port) + 1, timeout, mine)


def _receive_all(port: int, count: int, timeout: float, mine: Mapping[str, Any]) -> _Line:
  peers: dict[int, _Peer] = {}
  deadline = time.monotonic() + timeout

  def refuse(reason: str) -> None:
    for peer in peers.values():
      peer.send({"error": reason})
      peer.close()
    raise ValueError(reason)

  with socket.create_server(("", port)) as server:
    while len(peers) < count - 1:
      server.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        missing = sorted(set(range(1, count)) - set(peers))
        refuse(
          f"of {count} processes, process {', '.join(map(str, missing))} did not come within "
          f"{timeout} s"
        )
      peer = _Peer(connection, timeout)
      theirs = None
      with contextlib.suppress(TimeoutError):
        theirs = peer.receive()
      if theirs is None or not {"process", "host", "flags"} <= set(theirs):
        peer.close()  # a stranger
        continue
      number = theirs["process"]
      peer.name = f"process {number} on {theirs['host']}"
      twice = number in peers
      peers[number if not twice else -1] = peer
      if twice:
        refuse(f"two processes were started with --jax_distributed.process_id={number}")
      if difference := _difference(mine, theirs):
        refuse(difference)
  for peer in peers.values():
    peer.send({"name": f"process 0 on {mine['host']}"})
  return _Line(list(peers.values()), timeout)


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
  for name in sorted(mine["flags"].keys() | theirs["flags"].keys()):
    own, other = mine["flags"].get(name), theirs["flags"].get(name)
    if own != other:
      return (
        f"process {theirs['process']} on {theirs['host']} was started with --{name}={other}, "
        f"process 0 with --{name}={own}"
      )
  return None


def _call(host: str, port: int, timeout: float, mine: Mapping[str, Any]) -> _Line:
  deadline = time.monotonic() + timeout
  while True:
    try:
      connection = socket.create_connection((host, port), timeout=1)
      break
    except OSError as error:
      if time.monotonic() > deadline:
        raise ValueError(
          f"process 0 did not answer at {host}:{port} within {timeout} s: {error}"
        ) from error
      time.sleep(0.1)
  # Process 0 waits for the last one, and then tells what it is waiting for.
  peer = _Peer(connection, 2 * timeout)
  peer.send(mine)
  try:
    answer = peer.receive()
  except TimeoutError:
    answer = None
  if answer is None or "error" in answer:
    peer.close()
    ended = {"error": f"process 0 at {host}:{port} ended while the processes met"}
    raise ValueError((answer or ended)["error"])
  peer.name = answer["name"]
  connection.settimeout(timeout)
  return _Line([peer], timeout)
