"""Downloads from a server that refuses, does not exist, or never responds."""

import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "download.py"
TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def server():
  """Returns a function that starts a server which sends a status, or for None no response."""
  opened, release = [], threading.Event()

  def start(status: int | None) -> str:
    class Handler(BaseHTTPRequestHandler):
      def do_GET(self):
        if status is None:
          release.wait()
          return
        self.send_response(status)
        self.end_headers()
        # A careless server (or proxy) repeats the request in its response.
        self.wfile.write(f"no: {self.headers.get('authorization')}".encode())

      do_HEAD = do_GET

      def log_message(self, *arguments):
        del arguments

    opened.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
    opened[-1].daemon_threads = True
    threading.Thread(target=opened[-1].serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{opened[-1].server_port}"

  yield start
  release.set()
  for each in opened:
    each.shutdown()
    each.server_close()


def download(endpoint: str, tmp_path: Path, *more: str) -> subprocess.CompletedProcess:
  environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
  environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
  environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
  return subprocess.run(
    [sys.executable, TOOL, "--repo_id=some/model", f"--output_dir={tmp_path / 'out'}", *more],
    env=environment, capture_output=True, text=True, timeout=100,
  )  # fmt: skip


@pytest.mark.parametrize("status", [401, 403, 404, 500, "offline", None])
def test_failed_download_is_one_sentence_without_the_token(server, tmp_path, status):
  if status == "offline":
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
  else:
    endpoint = server(status)
  done = download(endpoint, tmp_path, f"--access_token={TOKEN}")
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: cannot download some/model: ")
  assert "Traceback" not in done.stderr and TOKEN not in done.stderr + done.stdout
  assert not list((tmp_path / "out").glob("*.safetensors"))
