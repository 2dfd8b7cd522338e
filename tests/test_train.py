"""Training as a user runs it: a whole run, a killed and resumed one, and runs from checkpoints."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ll3m.core import checkpoint
from ll3m.core.model_config import ModelConfig
from ll3m.data.batch import Batch
from ll3m.data.config import DatasetConfig, SeqioDatasetConfig, TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
from ll3m.training import logger
from tests import tiny_runs
from tests.compiled import quickly
from tests.traces import traced_steps

TOTAL = 40


@pytest.fixture(scope="session")
def arguments(byte_tokenizer) -> list[str]:
  """Flags of a tiny model on a real mixture, with two micro-steps, evaluation and checkpoints."""
  return [
    *tiny_runs.flags(byte_tokenizer, rows=2, shards=3),
    "--train_dataset.seqio_dataset.mixture_or_task_name=python_mixture",
    f"--total_steps={TOTAL}",
    "--save_model_freq=10",
    "--log_freq=1",
    "--eval_steps=2",
    "--optimizer.accumulate_gradient_steps=2",
    "--z_loss=1e-4",
  ]


@pytest.fixture(scope="session")
def finished(arguments, run_command, tmp_path_factory) -> Path:
  """Output_dir of an uninterrupted run, logged to Weights & Biases offline."""
  output = tmp_path_factory.mktemp("runs") / "finished"
  done = run_command(
    "train",
    *arguments,
    f"--logger.output_dir={output}",
    "--logger.online",
    "--checkpointer.max_to_keep=3",
    "--profile_steps=3:4",
    env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
  )
  assert done.returncode == 0, done.stderr
  (output / "stderr.txt").write_text(done.stderr)
  return output


def next_batches(step: Path, tokenizer: Path, count: int = 20) -> list[Batch]:
  """Returns the batches that a run would read after a step."""
  from tests.data.opening import open_dataset

  dataset = DatasetConfig(
    seqio_dataset=SeqioDatasetConfig(
      "python_mixture", batch_size=2, task_feature_lengths=(32,), num_shards=3
    )
  )
  opened = load_tokenizer(TokenizerConfig(path=str(tokenizer)))
  batches = open_dataset(dataset, opened, rows=[0, 1], seed=42)
  batches.set_state(checkpoint.open_checkpoint(step).dataset_state())
  return list(itertools.islice(batches, count))


def assert_same(step: Path, other: Path, tokenizer: Path) -> None:
  """Asserts that two steps have the same parameters and optimizer state, bitwise, and next batches.

  The saved positions themselves may differ, because tf.data includes what its threads happen to
  have read ahead.
  """
  ours, theirs = tiny_runs.arrays(step), tiny_runs.arrays(other)
  assert ours.keys() == theirs.keys()
  assert not [name for name in ours if ours[name] != theirs[name]]
  expected = next_batches(step, tokenizer)
  assert len({batch.inputs.tobytes() for batch in expected}) == len(expected)
  np.testing.assert_equal(next_batches(other, tokenizer), expected)


def losses(output: Path) -> dict[int, float]:
  return {
    r["step"]: r["loss"] for r in logger.read_metrics(output / "metrics.jsonl") if "loss" in r
  }


def test_a_run_writes_its_metrics_plots_traces_and_checkpoints(finished):
  records = logger.read_metrics(finished / "metrics.jsonl")
  training = [r for r in records if "loss" in r]
  assert [r["step"] for r in training] == list(range(1, TOTAL + 1))
  for record in training:
    assert set(record) == {
      "step", "loss", "z_loss", "accuracy", "learning_rate", "gradient_norm", "parameter_norm",
      "tokens_per_second", "step_seconds", "skipped_steps",
    }  # fmt: skip
    assert all(np.isfinite(list(record.values())))
  assert abs(training[0]["loss"] - np.log(258)) < 0.3  # random parameters predict uniformly
  held_out = [r for r in records if "eval_loss" in r]
  assert [r["step"] for r in held_out] == [0, TOTAL]
  assert held_out[1]["eval_loss"] < held_out[0]["eval_loss"]
  assert held_out[1]["eval_perplexity"] == pytest.approx(np.exp(held_out[1]["eval_loss"]))
  assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert list((finished / "tensorboard").glob("events.*"))
  experiment = (finished / "wandb_id").read_text().strip()
  assert list((finished / "wandb").glob(f"offline-run-*-{experiment}/*.wandb"))
  assert json.loads((finished / "flags.json").read_text())["optimizer.adamw_optimizer.lr"] == 0.01
  assert checkpoint.finished_steps(finished) == [20, 30, 40]
  assert traced_steps(finished) == [3, 4]
  assert "step 40/40" in (finished / "stderr.txt").read_text()
  assert "\x1b" not in (finished / "stderr.txt").read_text()  # no control codes in a log


def test_checkpoints_have_model_and_tokenizer(finished):
  opened = checkpoint.open_checkpoint(finished)
  assert opened.step == TOTAL and opened.family == "llama"
  assert opened.config.d_model == 16 and isinstance(opened.config, ModelConfig)
  assert (opened.tokenizer_dir / "tokenizer.json").exists()
  assert checkpoint.open_checkpoint(finished / "checkpoints" / "20").step == 20


@pytest.fixture(scope="session")
def killed_and_resumed(arguments, run_command, tmp_path_factory) -> Path:
  """Output_dir of a run that was killed after a checkpoint and started again."""
  output = tmp_path_factory.mktemp("runs") / "killed"
  command = [sys.executable, "-m", "ll3m.train", *arguments, f"--logger.output_dir={output}"]
  environment = os.environ | quickly()
  with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
    deadline = time.monotonic() + 240
    while not checkpoint.finished_steps(output):
      assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert checkpoint.finished_steps(output)[-1] < TOTAL  # it was killed before its end
  done = run_command("train", *arguments, f"--logger.output_dir={output}")
  assert done.returncode == 0, done.stderr
  (output / "resumed.txt").write_text(done.stderr)
  return output


def test_resume_is_bitwise_after_sigkill(finished, killed_and_resumed, byte_tokenizer):
  assert "resuming from step" in (killed_and_resumed / "resumed.txt").read_text()
  last = Path("checkpoints") / str(TOTAL)
  assert_same(finished / last, killed_and_resumed / last, byte_tokenizer)
  assert losses(finished) == losses(killed_and_resumed)


def test_training_from_a_trainstate_and_dataset_state_is_bitwise_equal(
  finished, arguments, run_command, tmp_path, byte_tokenizer
):
  """The state is another run's step, and the output_dir is new."""
  step = finished / "checkpoints" / "30"
  done = run_command(
    "train",
    *arguments,
    f"--load_checkpoint=trainstate::{step}",
    f"--load_dataset_state={step}",
    f"--logger.output_dir={tmp_path}",
  )
  assert done.returncode == 0, done.stderr
  last = Path("checkpoints") / str(TOTAL)
  assert_same(finished / last, tmp_path / last, byte_tokenizer)


def test_a_run_from_parameters_without_saved_optimizer_cannot_be_resumed(
  finished, arguments, run_command, tmp_path
):
  command = [
    *arguments[3:],
    f"--load_checkpoint=trainstate_params::{finished}",
    f"--logger.output_dir={tmp_path}",
    "--checkpointer.save_optimizer_state=False",
  ]
  done = run_command("train", *command, "--total_steps=1")
  assert done.returncode == 0, done.stderr
  first = losses(tmp_path)[1]
  assert first < losses(finished)[1] - 0.1  # it started from trained parameters
  again = run_command("train", *command, "--total_steps=1")
  assert again.returncode == 0, again.stderr
  assert again.stdout.startswith(f"{tmp_path} is already at step 1 of 1; ")
  again = run_command("train", *command, "--total_steps=2")
  assert again.returncode == 1
  assert "saved without the optimizer" in again.stderr.splitlines()[-1]
  assert re.search(r"(--load_checkpoint|`load_checkpoint`)=params::", again.stderr.splitlines()[-1])


def test_a_run_resumes_without_the_checkpoint_it_was_loaded_from(finished, run_command, tmp_path):
  source = shutil.copytree(finished / "checkpoints" / "40", tmp_path / "source/checkpoints/40")
  shutil.copytree(finished / "tokenizer", tmp_path / "source" / "tokenizer")
  (tmp_path / "lines.jsonl").write_text('{"text": "some words"}\n' * 9 + '{"txt": ""}\n')
  output = tmp_path / "run"

  def train(*changes):
    return run_command(
      "train",
      f"--load_checkpoint=params::{source}",
      "--train_dataset.type=json",
      f"--train_dataset.json_dataset.path={tmp_path / 'lines.jsonl'}",
      "--train_dataset.seqio_dataset.batch_size=2",
      "--train_dataset.seqio_dataset.task_feature_lengths=(32,)",
      f"--logger.output_dir={output}",
      "--logger.tensorboard=False",
      *changes,
    )

  bad = f"{tmp_path / 'lines.jsonl'}:10: no field 'text'"
  held_out = ("--eval_dataset.type=json", f"--eval_dataset.json_dataset.path={bad.split(':')[0]}")
  for done in (
    train("--total_steps=1", "--strict"),
    run_command("evaluate", f"--checkpoint={source}", *held_out, "--strict",
                "--eval_dataset.seqio_dataset.task_feature_lengths=(32,)"),
  ):  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {bad} (--strict)"
  done = train("--total_steps=1")
  assert done.returncode == 0, done.stderr
  file = tmp_path / "lines.jsonl"
  skipped = f"{file}: 9 usable rows, skipped 1: no field 'text' (1); the first: {bad}"
  assert done.stderr.splitlines().count(f"warning: {skipped}") == 1
  assert done.stderr.count(str(bad)) == 1  # not repeated at the end
  shutil.rmtree(tmp_path / "source")
  done = train("--total_steps=2")
  assert done.returncode == 0, done.stderr
  assert "resuming from step 1" in done.stderr
  done = train("--total_steps=2")
  assert done.returncode == 0 and done.stdout.startswith(f"{output} is already at step 2 of 2; ")
  assert "compiled" not in done.stderr
  for flag, was in (("optimizer.type=lion", "adamw"), ("param_dtype=bf16", "float32"),
                    ("train_dataset.seqio_dataset.num_shards=2", "8")):  # fmt: skip
    done = train("--total_steps=3", f"--{flag}")
    assert done.returncode == 1
    name, _, asked = flag.replace("bf16", "bfloat16").partition("=")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and f"{output}/checkpoints/2" in last
    assert f"--{name}={was}," in last and last.endswith(asked)


def test_evaluate_matches_the_runs_own_evaluation(finished, arguments, run_command):
  data = [flag for flag in arguments if flag.startswith("--train_dataset.")]
  flags = [flag.replace("--train_dataset", "--eval_dataset") for flag in data]
  here = f"--checkpoint={finished.name}"  # a relative path, as users type it
  done = run_command("evaluate", here, *flags, "--eval_steps=2", "--json", cwd=finished.parent)
  assert done.returncode == 0, done.stderr
  record = json.loads(done.stdout)
  last = logger.read_metrics(finished / "metrics.jsonl")[-1]
  assert record["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
  assert record["accuracy"] == last["eval_accuracy"]
  assert record["targets"] == last["eval_targets"] < record["tokens"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(arguments, run_command, tmp_path):
  done = run_command("train", *arguments, f"--logger.output_dir={tmp_path / 'out'}", "--dry_run")
  assert done.returncode == 0, done.stderr
  assert "128 tokens per optimizer step" in done.stdout
  assert not (tmp_path / "out").exists()
