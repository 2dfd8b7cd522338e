"""Monitoring of a run's processes, each of which has a TCP connection to process 0.

The connections use the port after that of jax's coordination service. Processes compare their flags
over them before computing anything; when one closes, the others know at once which process died.

jax's coordination service lives in process 0 and aborts any process still connected when process 0
exits. So on success all processes exit together, and on failure process 0 exits last.
"""

import contextlib
import functools
import json
import socket
import threading
import time
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ll3m.core import stderr

# Seconds for the other processes to read why a process fails, and to exit before process 0 does.
_LAST_WORD = 1.0
# Seconds within which a peer's death is detected, after a collective has failed because of it.
_ECHO = 1.0
# Seconds within which a new connection must identify itself.
_INTRODUCTION = 5.0


class _Peer:
  """One end of a connection. Each line is a JSON object, or empty as a keep-alive message."""

  def __init__(self, connection: socket.socket, timeout: float):
    connection.settimeout(timeout)
    self.name = ""
    self._connection = connection
    self._file = connection.makefile("r", encoding="utf-8")
    self._lock = threading.Lock()

  def send(self, message: Mapping[str, Any] | None) -> None:
    """Sends an object or, for None, a keep-alive; only `receive` detects a closed connection."""
    text = "\n" if message is None else json.dumps(message) + "\n"
    with self._lock, contextlib.suppress(OSError):
      self._connection.sendall(text.encode())

  def close(self) -> None:
    """Closes the connection."""
    self._file.close()
    self._connection.close()

  def receive(self) -> dict[str, Any] | None:
    """Returns the next object; None if the connection has closed, or a line is not an object.

    Raises:
      TimeoutError: Nothing was received within the timeout.
    """
    try:
      for line in self._file:
        if line.strip():
          message = json.loads(line)
          return message if isinstance(message, dict) else None
    except TimeoutError:
      raise
    except (OSError, ValueError):
      pass
    return None


class PeerWatch:
  """The connections of one process: from process 0 to every other, from the others to process 0."""

  def __init__(self, peers: list[_Peer], timeout: float, *, leads: bool):
    self._peers, self._timeout, self._leads = peers, timeout, leads
    self._listeners = [threading.Thread(target=self._listen, args=(p,), daemon=True) for p in peers]
    self._over = False
    self._ending = threading.Lock()

  def watch(self) -> None:
    """Starts to receive messages and to send keep-alive messages in the background."""
    for listener in self._listeners:
      listener.start()
    threading.Thread(target=self._live, daemon=True).start()

  def leave(self) -> None:
    """Waits until all processes have finished, which process 0 announces."""
    if not self._leads:
      self._say({"bye": True})
    for listener in self._listeners:
      listener.join()
    if self._leads:
      self._say({"bye": True})
    self._over = True

  def fail(self, reason: str, leave: Callable[[], typing.NoReturn]) -> typing.NoReturn:
    """Notifies all peers of an error of this process, and ends it with `leave`.

    If a peer has just died, the error is only a consequence of that, in a collective. The process
    then ends with a message that names the peer.
    """
    time.sleep(_ECHO)
    self._end({"failed": reason}, leave)

  def _end(
    self, message: Mapping[str, Any], leave: Callable[[], typing.NoReturn]
  ) -> typing.NoReturn:
    """Sends all peers a message, gives them time to exit, and ends the process with `leave`."""
    # Never released: while this process exits, its other threads fail, too, without their peers.
    self._ending.acquire()
    self._over = True
    self._say(message)
    if self._leads:
      time.sleep(_LAST_WORD)
    elif threading.current_thread() not in self._listeners:
      self._listeners[0].join(_LAST_WORD)  # until process 0 answers
    leave()

  def _say(self, message: Mapping[str, Any] | None) -> None:
    for peer in self._peers:
      peer.send(message)

  def _live(self) -> None:
    while not self._over:
      self._say(None)
      time.sleep(self._timeout / 4)

  def _listen(self, peer: _Peer) -> None:
    try:
      message = peer.receive()
    except TimeoutError:
      reason = f"{peer.name} has not responded for {self._timeout:.0f} s"
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
      # The main thread may be blocked in a collective, where no exception reaches it.
      self._end({"error": reason}, functools.partial(stderr.leave, f"error: {reason}", 1))


def connect(
  address: str, process: int, count: int, timeout: float, settings: Mapping[str, Any]
) -> PeerWatch:
  """Connects all processes of a run and compares their flags.

  Args:
    address: HOST:PORT of jax's coordination service; the connections use the port after it.
    process: Index of this process, from 0.
    count: Number of processes.
    timeout: Seconds to wait for a process to connect and, later, for its keep-alive messages.
    settings: Flags, which must be the same in all processes.

  Raises:
    ValueError: A process does not connect in time, a process was started with other flags, or the
      port is in use.
  """
  host, _, port = address.rpartition(":")
  mine = {
    "process": process,
    "host": socket.gethostname(),
    "flags": {name: repr(value) for name, value in settings.items()},
  }
  if process == 0:
    return _receive_all(int(port) + 1, count, timeout, mine)
  return _call(host.strip("[]"), int(port) + 1, timeout, mine)


def open_port(port: int) -> socket.socket:
  """Listens on a port of this machine.

  Raises:
    ValueError: The port is in use.
  """
  try:
    return socket.create_server(("", port))
  except OSError as error:
    raise ValueError(
      f"process 0 cannot listen on port {port}, which `jax_distributed.coordinator_address` "
      f"requires: {error.strerror}"
    ) from error


def _receive_all(port: int, count: int, timeout: float, mine: Mapping[str, Any]) -> PeerWatch:
  peers: dict[int, _Peer] = {}
  deadline = time.monotonic() + timeout

  def refuse(reason: str) -> None:
    for peer in peers.values():
      peer.send({"error": reason})
      peer.close()
    raise ValueError(reason)

  def remaining() -> float:
    return max(0.01, deadline - time.monotonic())

  with open_port(port) as server:
    while len(peers) < count - 1:
      server.settimeout(remaining())
      try:
        connection, _ = server.accept()
      except TimeoutError:
        missing = sorted(set(range(1, count)) - set(peers))
        refuse(
          f"process {', '.join(map(str, missing))} of {count} did not connect within {timeout} s"
        )
      peer = _Peer(connection, min(_INTRODUCTION, remaining()))
      theirs = None
      with contextlib.suppress(TimeoutError):
        theirs = peer.receive()
      if theirs is None or not _is_introduction(theirs, count):
        peer.close()  # not a process of this run
        continue
      connection.settimeout(timeout)
      number = theirs["process"]
      peer.name = f"process {number} on {theirs['host']}"
      twice = number in peers
      peers[number if not twice else -1] = peer
      if twice:
        refuse(f"two processes were started with `jax_distributed.process_id`={number}")
      if difference := _difference(mine, theirs):
        refuse(difference)
  for peer in peers.values():
    peer.send({"name": f"process 0 on {mine['host']}"})
  return PeerWatch(list(peers.values()), timeout, leads=True)


def _is_introduction(message: Mapping[str, Any], count: int) -> bool:
  return (
    message.keys() >= {"process", "host", "flags"}
    and message["process"] in range(1, count)
    and isinstance(message["flags"], dict)
  )


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
  for name in sorted(mine["flags"].keys() | theirs["flags"].keys()):
    own, other = mine["flags"].get(name), theirs["flags"].get(name)
    if own != other:
      return (
        f"process {theirs['process']} on {theirs['host']} was started with `{name}`={other}, "
        f"process 0 with `{name}`={own}"
      )
  return None


def _call(host: str, port: int, timeout: float, mine: Mapping[str, Any]) -> PeerWatch:
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
  # Process 0 waits for the last process and, if that does not connect, reports it to the others.
  peer = _Peer(connection, 2 * timeout)
  peer.send(mine)
  try:
    answer = peer.receive()
  except TimeoutError:
    answer = None
  if answer is None or "name" not in answer:
    peer.close()
    ended = f"process 0 at {host}:{port} exited during startup"
    raise ValueError((answer or {}).get("error", ended))
  peer.name = answer["name"]
  connection.settimeout(timeout)
  return PeerWatch([peer], timeout, leads=False)
