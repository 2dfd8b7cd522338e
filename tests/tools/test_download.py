"""Downloads from a local hub; tests/faults/test_download.py covers a hub that fails."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "download.py"
TOKEN = "hf_" + "s3cret" * 5
COMMIT = "0123456789" * 4
CHUNK = 10 * 2**20  # huggingface_hub writes in chunks of this size and resumes after the last one
WEIGHTS = np.random.default_rng(0).bytes(3 * CHUNK)
COMPANIONS = {
  "config.json": b"{}",
  "tokenizer.json": b"[]",
  "tokenizer.model": b"t",
  "LICENSE": b"L",
}
FILES = COMPANIONS | {
  "model-00001-of-00002.safetensors": WEIGHTS,
  "model-00002-of-00002.safetensors": WEIGHTS[:1000],
  "model.safetensors.index.json": b'{"weight_map": {}}',
  "pytorch_model.bin": b"pickle",
  "original/consolidated.00.safetensors": b"another copy",
  "onnx/model.onnx": b"for another program",
}


class Hub(ThreadingHTTPServer):
  """A server with a single model, whose files it serves to clients with the token.

  Attributes:
    files: The contents of the model's files, by name.
    requests: The requests for files: (name, Range header or None).
    cut: The names of files whose first response breaks off half-way.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.files = dict(FILES)
    self.requests: list[tuple[str, str | None]] = []
    self.cut: set[str] = set()

  @property
  def address(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"

  def asked_for(self) -> set[str]:
    return {name for name, _ in self.requests}


class _Handler(BaseHTTPRequestHandler):
  def do_GET(self, with_body: bool = True):
    files = self.server.files
    if self.headers.get("authorization") != f"Bearer {TOKEN}":
      return self._answer(401, b"")
    if re.fullmatch(r"/api/models/some/model(/revision/\w+)?", self.path.partition("?")[0]):
      siblings = [{"rfilename": name} for name in files]
      return self._answer(
        200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode()
      )
    if self.path.startswith(f"/api/models/some/model/tree/{COMMIT}"):
      tree = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
      ]
      return self._answer(200, json.dumps(tree).encode())
    found = re.fullmatch(r"/some/model/resolve/(\w+)/(.*)", self.path)
    if found is None or found[2] not in files:
      return self._answer(404, b"")
    name, data = found[2], files[found[2]]
    headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
    if not with_body:
      return self._answer(200, data, headers, with_body=False)
    wanted = self.headers.get("range")
    self.server.requests.append((name, wanted))
    if wanted is None:
      return self._answer(200, data, headers, breaks=name in self.server.cut)
    first = int(re.fullmatch(r"bytes=(\d+)-\d*", wanted)[1])
    headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
    return self._answer(206, data[first:], headers)

  def do_HEAD(self):
    self.do_GET(with_body=False)

  def _answer(self, status, body, headers=None, *, with_body=True, breaks=False):
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if with_body:
      self.wfile.write(body[: len(body) // 2] if breaks else body)
    self.close_connection = breaks

  def log_message(self, *arguments):
    del arguments


@pytest.fixture
def hub():
  with Hub() as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def download(hub, tmp_path):
  """Returns a function that runs the tool and returns the process and the downloaded files."""

  def run(*flags: str) -> tuple[subprocess.CompletedProcess, dict[str, bytes]]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment = kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    output = tmp_path / "out"
    done = subprocess.run(
      [sys.executable, TOOL, "--repo_id=some/model", f"--output_dir={output}",
       f"--access_token={TOKEN}", *flags],
      env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    files = (path for path in output.rglob("*") if path.is_file() and ".cache" not in path.parts)
    assert TOKEN not in done.stdout + done.stderr
    return done, {str(path.relative_to(output)): path.read_bytes() for path in files}

  return run


def test_downloads_safetensors_config_and_tokenizer_once(hub, download):
  expected = {k: v for k, v in FILES.items() if "/" not in k and not k.endswith(".bin")}
  done, found = download()
  assert done.returncode == 0, done.stderr
  assert found == expected and hub.asked_for() == set(expected)
  hub.requests.clear()
  done, again = download()
  assert done.returncode == 0, done.stderr
  assert again == expected and not hub.requests


def test_downloads_bin_files_if_there_are_no_safetensors(hub, download):
  hub.files = COMPANIONS | {"pytorch_model.bin": b"pickle"}
  done, found = download()
  assert done.returncode == 0, done.stderr
  assert found == hub.files


def test_resumes_an_interrupted_file(hub, download):
  name = "model-00001-of-00002.safetensors"
  hub.cut.add(name)
  done, found = download()
  assert done.returncode == 0, done.stderr
  assert found[name] == WEIGHTS
  first, *rest = [wanted for asked, wanted in hub.requests if asked == name]
  assert first is None and rest == [f"bytes={CHUNK}-"]
  # The interruption is reported once.
  assert done.stderr.count("peer closed connection") == 1


def test_rejects_a_model_without_weights(hub, download):
  hub.files = dict(COMPANIONS)
  done, found = download()
  assert done.returncode == 1 and not found
  assert done.stderr.splitlines()[-1] == (
    "error: cannot download some/model: expected safetensors or .bin files, got only "
    "config.json, tokenizer.json, tokenizer.model, LICENSE"
  )
