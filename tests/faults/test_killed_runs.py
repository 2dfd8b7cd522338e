"""Training runs that are killed, stopped by a signal, or started twice."""

import re
import signal
import time
from pathlib import Path

import pytest

from ll3m.core import checkpoint
from ll3m.training import preemption
from ll3m.training.logger import read_metrics
from tests.faults.causing import REPETITIONS, SOAK, files
from tests.tiny_runs import arrays

# A save takes about as long as 20 steps, so one is always in progress.
TOTAL = 3000 if SOAK else 600
OFTEN = (f"--total_steps={TOTAL}", "--log_freq=20", "--save_model_freq=20")


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory) -> Path:
  output = tmp_path_factory.mktemp("runs") / "uninterrupted"
  with start(output, *OFTEN) as job:
    assert job.end(300) == 0, job.said()
  return output


def assert_same_end(output: Path, expected: Path) -> None:
  """Asserts that the last steps of two runs have the same arrays, bit for bit."""
  last = Path("checkpoints") / str(TOTAL)
  assert arrays(output / last) == arrays(expected / last)


def saving(output: Path) -> bool:
  return any(output.glob("checkpoints/*tmp*"))


def test_resume_is_bitwise_after_kills_during_saves(start, uninterrupted, tmp_path, chance):
  """The run is killed several times, at random moments of a save."""
  output, reached = tmp_path / "killed", 0
  for _ in range(REPETITIONS):
    with start(output, *OFTEN) as job:
      job.wait_for(lambda job=job: "compiled" in job.said())
      job.wait_for(lambda: checkpoint.finished_steps(output))
      # Let it make progress, then kill it during a save.
      time.sleep(chance.uniform(0, 0.5))
      job.wait_for(lambda: saving(output))
      time.sleep(chance.uniform(0, 0.04))
      job.signal(signal.SIGKILL)
      assert job.end() == -signal.SIGKILL, job.said()
    opened = checkpoint.open_checkpoint(output)  # verified: the last good step loads
    arrays(opened.path)
    assert opened.step >= reached
    assert f"resuming from step {reached}" in job.said() or not reached
    reached = opened.step
  assert reached < TOTAL
  with start(output, *OFTEN) as job:
    assert job.end() == 0, job.said()
  assert f"resuming from step {reached}" in job.said()
  assert_same_end(output, uninterrupted)
  assert not saving(output)  # leftovers of the kills are deleted


def test_resume_is_bitwise_after_sigterm(start, uninterrupted, tmp_path, text):
  output = tmp_path / "stopped"
  held_out = (
    "--eval_steps=350",
    "--eval_freq=200",
    "--eval_dataset.type=json",
    f"--eval_dataset.json_dataset.path={text}",
    "--eval_dataset.seqio_dataset.num_shards=1",
  )
  rarely = (f"--total_steps={TOTAL}", "--log_freq=10", "--save_model_freq=0")

  def stop(job, *, within: float, saves: tuple[int, ...] = (1,)) -> str:
    before = checkpoint.finished_steps(output)
    job.signal(signal.SIGTERM)
    asked = time.monotonic()
    assert job.end(60) == preemption.EXIT_CODE, job.said()
    assert time.monotonic() - asked < within
    assert "Traceback" not in job.said()
    saved = set(checkpoint.finished_steps(output)) - set(before)
    assert len(saved) in saves
    return job.said()

  # During compilation, which nothing on the main thread can interrupt. There is nothing to save.
  with start(output, *rarely, compiles=True) as job:
    job.wait_for(lambda: (output / "tokenizer" / "tokenizer.json").exists())
    time.sleep(0.3)
    said = stop(job, within=2, saves=(0,))
  assert "compiled" not in said and "stopped by SIGTERM before the first step" in said

  # During the steps, with a second signal.
  with start(output, *rarely) as job:
    job.wait_for(lambda: "step 10/" in job.said())
    job.signal(signal.SIGTERM)
    said = stop(job, within=10)
  assert "stopped by SIGTERM" in said.splitlines()[-1] and "same command" in said.splitlines()[-1]
  stopped_at = checkpoint.open_checkpoint(output).step
  assert 10 < stopped_at < TOTAL

  # During an evaluation, which does not delay the exit.
  with start(output, *rarely, *held_out) as job:
    step = (stopped_at // 200 + 1) * 200
    job.wait_for(lambda: f"step {step}/{TOTAL}  loss" in job.said())
    said = stop(job, within=10)
  assert f"step {step}/{TOTAL}  eval loss" not in said
  assert checkpoint.open_checkpoint(output).step == step

  # The missed evaluation runs once, before the next step.
  with start(output, *rarely, *held_out) as job:
    job.wait_for(lambda: f"step {step}/{TOTAL}  eval loss" in job.said())
    said = stop(job, within=10, saves=(0, 1))  # it may not have made a step yet
  with start(output, *rarely, *held_out) as job:
    job.wait_for(lambda: "compiled" in job.said())
    stop(job, within=10, saves=(0, 1))
  evaluated = [r["step"] for r in read_metrics(output / "metrics.jsonl") if "eval_loss" in r]
  assert evaluated.count(step) == 1

  # During a save, which finishes; the step reached by then is saved, too.
  with start(output, *OFTEN) as job:
    job.wait_for(lambda: "compiled" in job.said())
    job.wait_for(lambda: saving(output))
    stop(job, within=10, saves=(1, 2))  # the first save may have finished before the signal

  with start(output, *OFTEN) as job:
    assert job.end(300) == 0, job.said()
  assert_same_end(output, uninterrupted)


@pytest.fixture
def foreground():
  """Enables SIGINT, which background processes and their children ignore."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(start, uninterrupted, tmp_path, foreground):
  output = tmp_path / "interrupted"
  rarely = (f"--total_steps={TOTAL}", "--log_freq=10")
  # Before the first step there is nothing to save, and compilation does not delay the exit.
  with start(output, *rarely, compiles=True) as job:
    job.wait_for(lambda: "compiling" in job.said())
    job.signal(signal.SIGINT)
    assert job.end(5) == preemption.INTERRUPTED, job.said()
  last = job.said().splitlines()[-1]
  assert "Ctrl-C" in last and "before the first step" in last
  assert not checkpoint.finished_steps(output)

  with start(output, *rarely) as job:
    job.wait_for(lambda: "step 10/" in job.said())
    job.signal(signal.SIGINT)
    assert job.end(60) == preemption.INTERRUPTED, job.said()
  assert "stopping after this step" in job.said()
  last = job.said().splitlines()[-1]
  assert "stopped by Ctrl-C" in last and "same command" in last
  assert "Traceback" not in job.said()
  (first,) = checkpoint.finished_steps(output)
  assert 10 <= first < TOTAL

  with start(output, *rarely) as job:
    job.wait_for(lambda: f"step {first // 10 * 10 + 10}/" in job.said())
    job.signal(signal.SIGINT)
    job.wait_for(lambda: "Ctrl-C again" in job.said())
    job.signal(signal.SIGINT)
    assert job.end(5) == preemption.INTERRUPTED, job.said()
  last = job.said().splitlines()[-1]
  assert "Ctrl-C" in last and "without saving" in last
  assert checkpoint.finished_steps(output) == [first]

  with start(output, *rarely) as job:
    assert job.end(300) == 0, job.said()
  assert f"resuming from step {first}" in job.said()
  assert_same_end(output, uninterrupted)


def test_sigterm_at_the_last_step_ends_the_run(start, copy, text):
  evaluation = (
    "--eval_steps=350",
    "--eval_dataset.type=json",
    f"--eval_dataset.json_dataset.path={text}",
    "--eval_dataset.seqio_dataset.num_shards=1",
  )
  with start(copy, "--total_steps=31", *evaluation) as job:
    job.wait_for(lambda: "step 31/31  loss" in job.said())
    job.signal(signal.SIGTERM)
    assert job.end(60) == 0, job.said()
  assert "eval loss" not in job.said() and "same command" not in job.said()
  assert "the last evaluation" in job.said()
  assert checkpoint.open_checkpoint(copy).step == 31


def test_second_job_in_the_same_folder_is_refused(start, arguments, run_command, tmp_path):
  output = tmp_path / "run"
  with start(output, "--total_steps=1000000") as job:
    job.wait_for(lambda: "compiled" in job.said())
    other = run_command("train", *arguments, "--total_steps=5", f"--logger.output_dir={output}")
    assert other.returncode == 1
    assert f"error: another job writes to {output} (process " in other.stderr.splitlines()[-1]
    assert job.running()


def test_full_disk_ends_the_run_and_earlier_steps_are_unaffected(start, copy, tmp_path):
  """The error of the background save arises between two saves, and ends the run before the next."""
  # The size of a step's largest file depends on how Orbax batches its writes, so that a step or two
  # may succeed.
  before, steps = files(copy / "checkpoints"), (copy / "checkpoints").rglob("*")
  size = max(file.stat().st_size for file in steps if file.is_file())
  more = ("--total_steps=1000000", "--save_model_freq=40", "--checkpointer.max_to_keep=1")
  with start(copy, *more, file_limit=size - 1000) as job:
    assert job.end() == 1, job.said()
  last = job.said().splitlines()[-1]
  found = re.match(rf"error: step (\d+) could not be saved in {copy}/checkpoints: ", last)
  assert found and "File too large" in job.said(), job.said()
  # TensorStore prints this traceback for each write that Orbax no longer waits for.
  closed = job.said().count("\nRuntimeError: Event loop is closed\n")
  assert job.said().count("Traceback") == closed, job.said()
  good = max(30, int(found[1]) - 40)
  assert int(found[1]) % 40 == 0
  # Only one step is kept: the good one, which is verified here, not the one that failed.
  assert checkpoint.open_checkpoint(copy).step == good
  after = files(copy / "checkpoints")
  assert good > 30 or {name: after.get(name) for name in before} == before
  with start(copy, f"--total_steps={good + 11}") as job:  # with disk space, the run resumes
    assert job.end() == 0, job.said()
  assert f"resuming from step {good}" in job.said()


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    (
      ["--update_model_config=vocab_size=300"],
      "vocab_size is 258 in the checkpoint",
    ),
    (
      ["--optimizer.adamw_optimizer.lr=0.1", "--param_dtype=bf16"],
      "it was saved with --param_dtype=float32",
    ),
  ],
)
def test_folder_of_another_run_is_refused_and_unchanged(
  copy, arguments, run_command, changes, sentence
):
  (copy / "checkpoints" / "35.orbax-checkpoint-tmp").mkdir()
  (copy / "checkpoints" / "notes.txt").write_text("mine")
  (copy / "checkpoints" / "best").mkdir()
  (copy / "notes.txt").write_text("mine")
  before = files(copy)
  kept = [flag for flag in arguments if not flag.startswith(changes[0].partition("=")[0])]
  flags = (*kept, *changes, "--total_steps=40", f"--logger.output_dir={copy}")
  done = run_command("train", *flags)
  assert done.returncode == 1
  assert sentence in done.stderr.splitlines()[-1]
  assert files(copy) == before


def test_foreign_files_are_left_alone(start, copy):
  (copy / "checkpoints" / "notes.txt").write_text("mine")
  (copy / "checkpoints" / "best").mkdir()
  (copy / "checkpoints" / "best" / "x").write_text("mine")
  for step in (12, 31):  # leftovers of a killed job; step 31 is saved again, step 12 is not
    (copy / "checkpoints" / f"{step}.orbax-checkpoint-tmp").mkdir()
  with start(copy, "--total_steps=31") as job:
    assert job.end() == 0, job.said()
  assert (copy / "checkpoints" / "notes.txt").read_text() == "mine"
  assert (copy / "checkpoints" / "best" / "x").read_text() == "mine"
  assert checkpoint.finished_steps(copy)[-1] == 31
  assert not (copy / "checkpoints" / "31.orbax-checkpoint-tmp").exists()
  assert not (copy / "checkpoints" / "12.orbax-checkpoint-tmp").exists()


def test_impossible_output_folder_is_reported_before_anything_is_loaded(
  arguments, run_command, tmp_path
):
  (tmp_path / "file").write_text("")
  flag = f"--logger.output_dir={tmp_path / 'file' / 'run'}"
  done = run_command("train", *arguments, "--total_steps=1", flag)
  assert done.returncode == 1
  assert str(tmp_path / "file") in done.stderr.splitlines()[-1]
  assert "compiled" not in done.stderr
