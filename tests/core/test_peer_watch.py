"""Connections between the processes of a run; tests/test_processes.py starts such runs."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from ll3m.core import peer_watch


def test_duplicate_process_id_is_reported_to_all(free_port):
  """Two of three processes have index 1, and all three processes raise the same error."""
  port = free_port()
  heard = []

  def meet(process):
    try:
      peer_watch.connect(f"localhost:{port}", process, 3, 20, {"seed": 1})
    except ValueError as error:
      heard.append(str(error))

  threads = [threading.Thread(target=meet, args=(process,)) for process in (0, 1, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  assert heard == ["two processes were started with `jax_distributed.process_id`=1"] * 3


@pytest.mark.parametrize(
  ("dies", "sentence"), [(True, "error: process 1 on {host} has died"), (False, "error: an echo")]
)
def test_error_caused_by_a_dead_peer_names_the_peer(free_port, dies, sentence):
  """The collective fails a moment before the closed connection to the peer is detected."""
  script = f"""
import threading
from ll3m.core import peer_watch, stderr
met = {{}}
def meet(process):
  met[process] = peer_watch.connect("localhost:{free_port()}", process, 2, 20, {{}})
threads = [threading.Thread(target=meet, args=(process,)) for process in (0, 1)]
for thread in threads: thread.start()
for thread in threads: thread.join()
met[0].watch()
if {dies}: threading.Timer(0.2, met[1]._peers[0].close).start()
met[0].fail("an echo", lambda: stderr.leave("error: an echo", 1))
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  expected = sentence.format(host=socket.gethostname())
  assert (done.returncode, done.stderr) == (1, expected + "\n")


def test_missing_process_0_is_reported(free_port):
  port = free_port()
  with pytest.raises(
    ValueError, match=f"process 0 did not answer at localhost:{port + 1} within 1"
  ):
    peer_watch.connect(f"localhost:{port}", 1, 2, 1, {})


def test_foreign_connections_are_closed(free_port):
  """Connections that send nothing, or anything else, neither end nor delay the start-up."""
  port = free_port()
  started = time.monotonic()
  met = []
  leader = threading.Thread(target=lambda: met.append(peer_watch.connect(f":{port}", 0, 2, 60, {})))
  leader.start()
  said = (
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"[1]\n",
    b'"process"\n',
    b'{"process": 2, "host": "", "flags": {}}\n',
    b'{"process": [1], "host": "", "flags": {}}\n',
    b'{"process": 1, "host": "", "flags": []}\n',
  )
  with contextlib.ExitStack() as strangers:
    for text in said:
      strangers.enter_context(_connect(port + 1)).sendall(text)
    met.append(peer_watch.connect(f"localhost:{port}", 1, 2, 60, {}))
    leader.join(timeout=60)
  assert len(met) == 2
  for peer in (peer for end in met for peer in end._peers):
    peer.close()
  assert time.monotonic() - started < 30


def test_port_in_use_is_named(free_port):
  port = free_port()
  with (
    socket.create_server(("", port)),
    pytest.raises(ValueError, match=f"process 0 cannot listen on port {port}, .* in use"),
  ):
    peer_watch.open_port(port)


def _connect(port: int) -> socket.socket:
  deadline = time.monotonic() + 20
  while True:
    try:
      return socket.create_connection(("localhost", port))
    except OSError:
      assert time.monotonic() < deadline
      time.sleep(0.05)
