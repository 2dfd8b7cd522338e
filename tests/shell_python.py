"""A `python` for shell commands: it forks `python -m ll3m.VERB ...` from the preloaded server."""

import json
import socketserver
import sys
import threading
from pathlib import Path

from tests.preloaded import Command

# Started without site-packages, it takes 20 ms. All but our commands goes to the real interpreter.
_PROGRAM = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:2] != ["-m"] or not sys.argv[2].startswith("ll3m."):
  os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as connection:
  connection.connect({address!r})
  request = [sys.argv[2].removeprefix("ll3m."), sys.argv[3:], dict(os.environ), os.getcwd()]
  connection.sendall(json.dumps(request).encode() + b"\\n")
  code, out, err = json.load(connection.makefile("rb"))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class _Handler(socketserver.StreamRequestHandler):
  def handle(self) -> None:
    verb, arguments, environment, folder = json.loads(self.rfile.readline())
    command = Command(verb, *arguments, env=environment, cwd=Path(folder))
    out, err = command.communicate(timeout=300)
    self.wfile.write(json.dumps([command.returncode, out, err]).encode())


class ShellPython:
  """A folder for PATH with such a `python`; use as a context manager.

  Attributes:
    folder: The folder.
  """

  def __init__(self, folder: Path):
    """Writes the program.

    Args:
      folder: An empty folder with a path short enough for a socket.
    """
    self.folder = folder
    address = str(folder / "socket")
    program = folder / "python"
    program.write_text(_PROGRAM.format(python=sys.executable, address=address))
    program.chmod(0o755)
    self._server = socketserver.ThreadingUnixStreamServer(address, _Handler)

  def __enter__(self) -> "ShellPython":
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._server.shutdown()
    self._server.server_close()
