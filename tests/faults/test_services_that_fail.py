"""What only shows a run elsewhere may fail."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ll3m.training.logger import read_metrics


class Broken(BaseHTTPRequestHandler):
  """A server that is there and answers every request with an error."""

  def do_POST(self):
    self.send_response(403)
    self.end_headers()
    self.wfile.write(b"{}")

  do_GET = do_POST

  def log_message(self, *arguments):
    del arguments


@pytest.fixture
def server():
  with HTTPServer(("127.0.0.1", 0), Broken) as opened:
    thread = threading.Thread(target=opened.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{opened.server_port}"
    opened.shutdown()
    thread.join()


def test_training_goes_on_without_tensorboard_and_weights_and_biases(
  arguments, run_command, tmp_path, server
):
  output = tmp_path / "run"
  output.mkdir()
  (output / "tensorboard").write_text("a file where a folder should be")
  more = ("--total_steps=4", "--log_freq=1", "--logger.online", "--logger.tensorboard=True")
  done = run_command(
    "train", *arguments[:-1], *more, f"--logger.output_dir={output}",
    env={"WANDB_MODE": "online", "WANDB_BASE_URL": server, "WANDB_API_KEY": "k" * 40,
         "WANDB_SILENT": "true", "HOME": str(tmp_path)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  for name in ("TensorBoard", "Weights & Biases"):
    assert done.stderr.count(f"{name} is disabled from here on: ") == 1, done.stderr
  assert "Traceback" not in done.stderr and "k" * 40 not in done.stderr
  assert "\x1b" not in done.stderr and "\r" not in done.stderr  # nobody watches: plain lines
  assert [record["step"] for record in read_metrics(output / "metrics.jsonl")] == [1, 2, 3, 4]
  assert json.loads((output / "checkpoints" / "4" / "meta" / "metadata").read_text())["step"] == 4
  assert os.path.getsize(output / "loss.png") > 1000
