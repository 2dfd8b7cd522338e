"""Records, progress bar, plot and other sinks of a run."""

import io
import json
import struct
import sys

import pytest

from ll3m.training.logger import Logger, LoggerConfig, read_metrics

RECORD = {
  "loss": 2.0, "accuracy": 0.5, "learning_rate": 0.1, "gradient_norm": 1.0,
  "tokens_per_second": 10.0, "step_seconds": 1.0,
}  # fmt: skip


def open_logger(folder, first_step=0):
  config = LoggerConfig(output_dir=str(folder), tensorboard=False)
  return Logger(config, total_steps=4, first_step=first_step, flag_values={"lr": 0.1})


def test_records_are_written_at_once_and_shown_as_plain_lines(tmp_path, capsys):
  with open_logger(tmp_path) as logger:
    logger.log(1, RECORD)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1} | RECORD]
    logger.log(2, {"eval_loss": 1.0, "eval_perplexity": 2.7, "eval_accuracy": 0.6})
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("step 1/4  loss 2.0000") and "ETA 0:00:03" in lines[0]
  assert lines[1].startswith("step 2/4  eval loss 1.0000")
  assert json.loads((tmp_path / "flags.json").read_text()) == {"lr": 0.1}


def test_a_resumed_run_drops_the_records_of_later_steps(tmp_path):
  with open_logger(tmp_path) as logger:
    for step in (1, 2, 3):
      logger.log(step, RECORD)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 4, "lo')  # the unfinished line of a killed run
  with open_logger(tmp_path, first_step=2) as logger:
    assert logger.has(2, "loss")
    assert not logger.has(2, "eval_loss") and not logger.has(3, "loss")
  assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
  with open_logger(tmp_path):
    pass
  assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_only_resumed_runs_share_an_id_in_weights_and_biases(tmp_path, monkeypatch):
  ids = []

  class Wandb:
    def init(self, **options):
      ids.append(options["id"])
      return self

    def finish(self):
      pass

  monkeypatch.setitem(sys.modules, "wandb", Wandb())
  for folder, first_step in (("a", 0), ("b", 0), ("a", 2), ("a", 0)):
    config = LoggerConfig(str(tmp_path / folder / "out"), tensorboard=False, online=True)
    with Logger(config, total_steps=4, first_step=first_step, flag_values={}):
      pass
  a, b, resumed, anew = ids
  assert resumed == a and len({a, b, anew}) == 3


def test_a_sink_that_fails_twice_is_reported_once(tmp_path, monkeypatch, capsys):
  class Wandb:
    logged = 0

    def init(self, **options):
      return self

    def log(self, record, step):
      self.logged += 1
      raise RuntimeError("gone")

    def finish(self):
      raise RuntimeError("still gone")

  wandb = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  config = LoggerConfig(str(tmp_path), tensorboard=False, online=True)
  with Logger(config, total_steps=4, first_step=0, flag_values={}) as logger:
    logger.log(1, RECORD)
    logger.log(2, RECORD)
  told = [line for line in capsys.readouterr().err.splitlines() if "Weights & Biases" in line]
  assert told == ["Weights & Biases is disabled from here on: gone"] and wandb.logged == 1
  assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_plot_is_written_even_when_the_run_fails(tmp_path):
  with pytest.raises(KeyError), open_logger(tmp_path) as logger:
    logger.log(1, RECORD)
    raise KeyError("something")
  header = (tmp_path / "loss.png").read_bytes()[:24]
  assert header.startswith(b"\x89PNG")
  width, height = struct.unpack(">II", header[16:24])
  assert width > 500 and height > 300


def test_the_bar_says_first_step_until_that_step_is_finished(tmp_path, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with open_logger(tmp_path, first_step=1) as logger:
    assert "first step" in terminal.getvalue() and "1/4" in terminal.getvalue()
    shown = len(terminal.getvalue())
    logger.advance(2)
    logger.log(2, RECORD)
    logger.advance(2)
  assert "2/4" in terminal.getvalue()[shown:]
  assert "first step" not in terminal.getvalue()[shown:]
