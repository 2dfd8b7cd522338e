"""Runs of two processes with four devices each, compared with one process with eight."""

import gzip
import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest

from ll3m.core import checkpoint
from ll3m.training.logger import METRICS, read_metrics
from ll3m.training.preemption import EXIT_CODE, INTERRUPTED
from tests import tiny_runs
from tests.compiled import quickly
from tests.preloaded import Command
from tests.waiting import wait_for

STEPS = 10
# Seconds until an unresponsive process is reported, and seconds for all to exit after that.
TIMEOUT, PATIENCE = 15, 60


@pytest.fixture(scope="module")
def arguments(byte_tokenizer) -> list[str]:
  """A tiny float32 model on a real mixture, with two micro-steps and an intermediate checkpoint."""
  return [
    *tiny_runs.flags(byte_tokenizer, rows=8, shards=4, heads=4),
    "--train_dataset.seqio_dataset.mixture_or_task_name=python_mixture",
    "--optimizer.accumulate_gradient_steps=2",
    "--optimizer.adamw_optimizer.lr_decay_steps=20",
    "--save_model_freq=5",
    "--log_freq=1",
    "--logger.tensorboard=False",
  ]


@pytest.fixture(scope="module")
def streamed(arguments, tmp_path_factory) -> list[str]:
  """The same model in an endless run on streamed rows."""
  data = tiny_runs.streamed(tmp_path_factory.mktemp("rows"))
  others = [flag for flag in arguments if "mixture_or_task_name" not in flag]
  return [*others, *data, "--mesh_dim=2,2,2", "--total_steps=100000"]


def start(
  *arguments: str, devices: int, folder: Path | None = None, command: str = "train"
) -> Command:
  return Command(command, *arguments, env=os.environ | quickly(devices), cwd=folder)


@pytest.fixture(scope="module")
def start_two(free_port):
  """Returns a function that starts both processes of a run."""

  def start_both(
    *arguments: str,
    others: list[str] | None = None,
    folders: list[Path] | None = None,
    command: str = "train",
  ) -> list[Command]:
    """Starts both; `others` are flags of the second alone, `folders` their working directories."""
    joined = [
      f"--jax_distributed.coordinator_address=localhost:{free_port()}",
      "--jax_distributed.num_processes=2",
      f"--jax_distributed.timeout={TIMEOUT}",
    ]
    return [
      start(
        *arguments,
        *joined,
        f"--jax_distributed.process_id={i}",
        *extra,
        devices=4,
        folder=at,
        command=command,
      )
      for i, (extra, at) in enumerate(zip(([], others or []), folders or (None, None), strict=True))
    ]

  return start_both


def finish(*processes: Command, seconds: float = 240) -> list[tuple[int, str]]:
  """Waits for all processes; returns their exit codes and stderr."""
  results = []
  try:
    for process in processes:
      _, stderr = process.communicate(timeout=seconds)
      results.append((process.returncode, stderr))
  finally:
    for process in processes:
      process.kill()
  return results


def losses(output: Path) -> list[float]:
  return [record["loss"] for record in read_metrics(output / METRICS) if "loss" in record]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> Path:
  """The output_dir of ten steps by one process with eight devices."""
  output = tmp_path_factory.mktemp("alone")
  mesh = "--mesh_dim=2,2,2"
  run = start(
    *arguments, mesh, f"--logger.output_dir={output}", f"--total_steps={STEPS}", devices=8
  )
  ((code, stderr),) = finish(run)
  assert code == 0, stderr
  return output


@pytest.fixture(scope="module")
def together(arguments, start_two, tmp_path_factory) -> Path:
  """The output_dir of the same run by two processes."""
  output = tmp_path_factory.mktemp("together")
  steps = f"--total_steps={STEPS}"
  run = start_two(*arguments, "--mesh_dim=2,2,2", f"--logger.output_dir={output}", steps)
  for code, stderr in finish(*run):
    assert code == 0, stderr
  return output


def test_two_processes_have_the_same_losses_as_one(alone, together):
  expected = losses(alone)
  assert len(expected) == STEPS and expected[-1] < expected[0] - 0.1
  assert losses(together) == pytest.approx(expected, abs=1e-6)


def test_run_of_two_processes_resumes_in_one_and_vice_versa(
  arguments, start_two, alone, together, tmp_path
):
  """The run uses two processes with 8 devices, one with 2 and other axes, one with 1, then two."""
  output = tmp_path / "half"
  shutil.copytree(together, output)
  shutil.rmtree(output / checkpoint.STEPS / str(STEPS))
  go_on = [*arguments, f"--logger.output_dir={output}"]
  step = STEPS // 2
  for devices, mesh in ((2, "1,1,2"), (1, "1,1,1")):
    step += 1
    run = start(*go_on, f"--mesh_dim={mesh}", f"--total_steps={step}", devices=devices)
    ((code, stderr),) = finish(run)
    assert code == 0, stderr
    assert f"resuming from step {step - 1}" in stderr
  for code, stderr in finish(*start_two(*go_on, "--mesh_dim=1,4,2", f"--total_steps={STEPS}")):
    assert code == 0, stderr
  assert losses(output) == pytest.approx(losses(alone), abs=2e-5)


def printed(*processes: Command) -> list[list[dict]]:
  """Returns the JSON lines that each process wrote to standard output, once all have succeeded."""
  results = [process.communicate(timeout=240) for process in processes]
  assert not any(process.returncode for process in processes), results
  # Between CPUs, jax's transport also writes to standard output, from several threads.
  return [[json.loads(record) for record in re.findall(r"{.*}", out)] for out, _ in results]


def test_two_processes_generate_the_same_text_as_one(together, start_two):
  """Sums have another order in float32, but the random model's most likely tokens are far apart."""
  asked = [f"--checkpoint={together}", "--prompt=def f", "--max_new_tokens=12", "--json"]
  ((expected,),) = printed(start(*asked, command="generate", devices=1))
  assert expected["tokens"]
  found = printed(*start_two(*asked, "--mesh_dim=1,2,4", command="generate"))
  assert found == [[expected], []]


def test_two_processes_have_the_same_evaluation_as_one(streamed, together, start_two):
  data = [flag.replace("train_", "eval_") for flag in streamed if flag.startswith("--train_data")]
  data.append("--eval_dataset.huggingface_dataset.split=train")
  asked = [f"--checkpoint={together}", *data, "--eval_steps=3", "--json"]
  ((expected,),) = printed(start(*asked, command="evaluate", devices=1))
  (found,), nothing = printed(*start_two(*asked, "--mesh_dim=2,2,2", command="evaluate"))
  assert not nothing and found["targets"] == expected["targets"] > 100
  assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_difference_in_flags_is_reported_by_both(arguments, start_two, tmp_path):
  run = start_two(
    *arguments, f"--logger.output_dir={tmp_path}", "--total_steps=2", others=["--seed=7"]
  )
  for code, stderr in finish(*run, seconds=PATIENCE):
    assert code == 1
    assert "was started with --seed=7, process 0 with --seed=42" in stderr.splitlines()[-1]
    assert "error: process 1 on " in stderr.splitlines()[-1]


def test_process_that_does_not_connect_is_named(arguments, free_port, tmp_path):
  port = free_port()
  run = start(
    *arguments, f"--logger.output_dir={tmp_path}", "--total_steps=2",
    f"--jax_distributed.coordinator_address=localhost:{port}", "--jax_distributed.num_processes=2",
    "--jax_distributed.process_id=0", "--jax_distributed.timeout=2", devices=4,
  )  # fmt: skip
  ((code, stderr),) = finish(run, seconds=PATIENCE)
  assert code == 1
  assert stderr.splitlines()[-1] == "error: process 1 of 2 did not connect within 2 s"


@pytest.mark.parametrize(
  ("victim", "number", "reason"),
  [
    (0, signal.SIGKILL, "has died"),
    (1, signal.SIGSTOP, f"has not responded for {TIMEOUT} s"),
  ],
)
def test_process_that_dies_is_named_by_the_other(
  streamed, start_two, tmp_path, victim, number, reason
):
  run = start_two(*streamed, f"--logger.output_dir={tmp_path}")
  try:
    wait_for(lambda: len(losses(tmp_path)) > 2)
    run[victim].send_signal(number)
    ((code, stderr),) = finish(run[1 - victim], seconds=PATIENCE)
  finally:
    for process in run:
      process.kill()
    finish(run[victim])
  assert code == 1
  sentence = [line for line in stderr.splitlines() if line.startswith("error: ")]
  assert len(sentence) == 1
  assert sentence[0].startswith(f"error: process {victim} on ")
  assert sentence[0].endswith(reason)


@pytest.mark.parametrize("victim", [0, 1])
def test_process_that_fails_is_named_by_both(byte_tokenizer, start_two, tmp_path, victim):
  """One process reads a damaged file, while the other waits for it in a collective."""
  folders = [tmp_path / str(process) for process in (0, 1)]
  for folder in folders:
    folder.mkdir()
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a row"}\n' * 32))
  (folders[victim] / "rows.jsonl.gz").write_bytes(b"no gzip")
  run = start_two(
    *tiny_runs.flags(byte_tokenizer, rows=8, shards=4),
    "--train_dataset.type=json",
    "--train_dataset.json_dataset.path=rows.jsonl.gz",
    f"--logger.output_dir={tmp_path}/output",
    "--mesh_dim=2,2,2",
    folders=folders,
  )
  results = finish(*run, seconds=PATIENCE)
  reason = "rows.jsonl.gz is not a complete gzip file"
  for process, (code, stderr) in enumerate(results):
    assert code == 1, stderr
    (sentence,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    named = f"error: process {victim} on {socket.gethostname()} has failed: "
    assert sentence.startswith(("error: " if process == victim else named) + reason)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_at_the_same_step_on_a_signal(streamed, start_two, tmp_path, number):
  """SIGINT goes to all, as from a terminal. Earlier, both have saved by process 0's clock."""
  rarely = ("--save_model_freq=0", "--save_model_minutes=0.001")
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # see test_killed_runs
  try:
    run = start_two(*streamed, *rarely, f"--logger.output_dir={tmp_path}")
  finally:
    signal.signal(signal.SIGINT, before)
  try:
    wait_for(lambda: checkpoint.finished_steps(tmp_path))
    assert all(step % 10 == 0 for step in checkpoint.finished_steps(tmp_path))
  finally:
    for process in run:
      process.send_signal(number)
  for code, stderr in finish(*run, seconds=PATIENCE):
    assert code == (EXIT_CODE if number == signal.SIGTERM else INTERRUPTED), stderr
  assert max(checkpoint.finished_steps(tmp_path)) == len(losses(tmp_path))
