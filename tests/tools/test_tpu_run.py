"""The launcher end to end, with a fake gcloud that runs each worker as a local process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_runs
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]

# Every worker has its own home below $WORKERS; all calls are recorded.
GCLOUD = """#!{python}
import json, os, shutil, subprocess, sys
workers = [os.path.join(os.environ["WORKERS"], name) for name in ("0", "1")]
arguments = sys.argv[1:]
with open(os.path.join(os.environ["WORKERS"], "calls"), "a") as calls:
  calls.write(json.dumps(arguments) + "\\n")
assert arguments[:3] == ["compute", "tpus", "tpu-vm"], arguments
verb, positional = arguments[3], [a for a in arguments[4:] if not a.startswith("--")]
options = dict(a[2:].split("=", 1) for a in arguments[4:] if a.startswith("--"))
assert options["zone"] == "here", options
if positional[-1].split(":")[0] != "pod":
  sys.exit("ERROR: there is no such TPU")
chosen = workers if options.get("worker") == "all" else [workers[int(options.get("worker", 0))]]
if verb == "describe":
  print(json.dumps({{"networkEndpoints": [{{}}, {{}}]}}))
elif verb == "scp":
  for home in chosen:
    shutil.copy(positional[0], os.path.join(home, positional[1].partition(":")[2]))
elif verb == "ssh":
  for home in chosen:
    if os.path.exists(os.path.join(home, "unreachable")):
      sys.exit("ERROR: no route to the worker")
    environment = os.environ | {{"HOME": home}}
    done = subprocess.run(["sh", "-c", options["command"]], env=environment, cwd=home)
    if done.returncode:
      sys.exit(done.returncode)
"""


@pytest.fixture(autouse=True)
def interruptible():
  """Makes the processes of a test receive Ctrl-C even if the tests run in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


class Pod:
  """Two workers, and the launcher's command line for them."""

  def __init__(self, folder: Path):
    self.workers, self.logs = folder / "workers", folder / "logs"
    for name in ("0", "1"):
      (self.workers / name).mkdir(parents=True)
    tools = folder / "bin"
    tools.mkdir()
    (tools / "gcloud").write_text(GCLOUD.format(python=sys.executable))
    (tools / "gcloud").chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin"
    keep = {k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "JAX_PLATFORMS")}
    self.environment = keep | {"PATH": path, "WORKERS": str(self.workers)}

  def start(self, *arguments: str, tpu: str = "pod") -> subprocess.Popen:
    return subprocess.Popen(
      [
        sys.executable, "tools/tpu_run.py", "--tpu", tpu, "--zone=here", "--install=",
        f"--output_dir={self.logs}", "--grace=5", *arguments,
      ],
      cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

  def run(self, *arguments: str, **options) -> tuple[int, str, str]:
    process = self.start(*arguments, **options)
    stdout, stderr = process.communicate(timeout=200)
    return process.returncode, stdout, stderr

  def groups(self) -> list[int]:
    """Returns the process groups of both workers' runs."""
    files = [self.workers / name / "ll3m_run" / "pid" for name in ("0", "1")]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_alive(group: int) -> bool:
  try:
    os.killpg(group, 0)
  except ProcessLookupError:
    return False
  return True


@pytest.fixture
def pod(tmp_path) -> Pod:
  return Pod(tmp_path)


@pytest.fixture
def script(tmp_path):
  """Returns a function that writes a script and returns the flag that names it."""

  def write(text: str) -> str:
    path = tmp_path / "script.sh"
    path.write_text(text)
    return f"--script={path}"

  return write


def test_output_is_shown_with_the_worker_number_and_written_to_files(pod, script, tmp_path):
  text = (
    """echo "$GREETING from $LL3M_WORKER of $LL3M_WORKERS"; ls pyproject.toml ll3m/train.py >&2"""
  )
  code, stdout, stderr = pod.run(script(text), "--env=GREETING=it's me")
  assert code == 0, stderr
  for worker in (0, 1):
    said = [f"it's me from {worker} of 2", "ll3m/train.py", "pyproject.toml"]
    assert sorted(l for l in stdout.splitlines() if f"worker {worker}" in l) == sorted(
      f"[worker {worker}] {line}" for line in said
    )
    assert sorted((pod.logs / "pod" / f"worker-{worker}.log").read_text().splitlines()) == said
  calls = [json.loads(line) for line in (pod.workers / "calls").read_text().splitlines()]
  assert {call[3] for call in calls} == {"describe", "scp", "ssh"}
  assert sum(call[3] == "scp" for call in calls) == 1  # only the archive is copied


def test_a_failed_worker_stops_the_others_and_sets_the_exit_code(pod, script):
  text = """trap 'echo saving; exit 9' TERM
if [ "$LL3M_WORKER" = 1 ]; then sleep 1; exit 3; fi
sleep 1000 & wait"""
  code, stdout, stderr = pod.run(script(text))
  assert code == 3, stderr
  assert "worker 1 ended with exit code 3" in stderr
  assert "[worker 0] saving" in stdout
  assert not any(map(is_alive, pod.groups()))


def test_ctrl_c_stops_all_workers(pod, script):
  process = pod.start(script("echo started; sleep 1000"))
  groups = pod.groups()
  assert all(map(is_alive, groups))
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130, stderr
  assert not any(map(is_alive, groups))


def test_a_run_that_is_still_installing_is_busy_and_stops(pod, script):
  text = script('echo trained > "$HOME/trained"')
  process = pod.start(text, "--install=sleep 1000")
  groups = pod.groups()
  assert "[worker 1] running" in pod.run("--status")[1]
  assert "still active on worker 0, 1" in pod.run(text)[2]
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130, stderr
  assert not any(map(is_alive, groups))
  assert not list(pod.workers.glob("*/trained"))


def test_a_failed_installation_fails_its_worker(pod, script):
  text = script('echo trained > "$HOME/trained"')
  code, stdout, stderr = pod.run(text, "--install=echo no network; exit 7")
  assert code == 7, stderr
  assert "[worker 0] no network" in stdout
  assert not list(pod.workers.glob("*/trained"))


def test_a_worker_that_cannot_be_stopped_is_reported(pod, script):
  code, _, stderr = pod.run(script("sleep 1000"), "--detach")
  assert code == 0, stderr
  groups = pod.groups()
  (pod.workers / "1" / "unreachable").touch()
  code, _, stderr = pod.run("--stop")
  assert code == 1
  assert stderr == "error: worker 1 of pod: ERROR: no route to the worker\n"
  assert [is_alive(group) for group in groups] == [False, True]
  (pod.workers / "1" / "unreachable").unlink()
  assert pod.run("--stop")[0] == 0
  assert not any(map(is_alive, groups))


def test_a_detached_run_continues_reports_its_status_and_can_be_stopped(pod, script):
  assert "no run" in pod.run("--status")[1]
  running = script("echo step 7; sleep 1000")
  code, _, stderr = pod.run(running, "--detach")
  assert code == 0, stderr
  groups = pod.groups()
  wait_for(lambda: "[worker 1] step 7" in pod.run("--status")[1])
  assert "[worker 0] running" in pod.run("--status")[1]
  code, _, stderr = pod.run(running)
  assert code == 1
  assert stderr == "error: a run is still active on worker 0, 1 of pod; end it with --stop\n"
  assert all(map(is_alive, groups))  # the run was not touched
  assert pod.run("--stop")[0] == 0
  assert not any(map(is_alive, groups))
  assert "[worker 0] stopped" in pod.run("--status")[1]


def test_a_script_that_ignores_sigterm_is_killed_after_the_grace_period(pod, script):
  code, _, stderr = pod.run(script("trap '' TERM; sleep 1000; sleep 1000"), "--detach")
  assert code == 0, stderr
  groups = pod.groups()
  assert pod.run("--stop")[0] == 0
  wait_for(lambda: not any(map(is_alive, groups)), seconds=5)


def test_two_workers_train_together(pod, script, byte_tokenizer, free_port, tmp_path):
  data = " ".join(tiny_runs.streamed(tmp_path / "rows"))
  model = "vocab_size=258,d_model=16,d_ff=24,num_layers=1,num_heads=2,num_kv_heads=1,head_dim=8"
  text = f"""set -e
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
export PYTHONPATH=$PWD:$PWD/kernels  # the transferred code
python -m ll3m.train --load_model_config=smollm2_135m --update_model_config={model} \
  --tokenizer.path={byte_tokenizer} --total_steps=2 --log_freq=1 --logger.tensorboard=False \
  {data} --train_dataset.seqio_dataset.batch_size=4 --mesh_dim=2,2,1 \
  --train_dataset.seqio_dataset.task_feature_lengths='(32,)' \
  --logger.output_dir={pod.workers}/output \
  --jax_distributed.coordinator_address=localhost:{free_port()} \
  --jax_distributed.num_processes=$LL3M_WORKERS --jax_distributed.process_id=$LL3M_WORKER
echo done $LL3M_WORKER"""
  code, stdout, stderr = pod.run(script(text))
  assert code == 0, stdout + stderr
  assert "[worker 0] done 0" in stdout and "[worker 1] done 1" in stdout
  assert "dp=2, fsdp=2, mp=1 (4 devices)" in stdout
  assert len((pod.workers / "output" / "metrics.jsonl").read_text().splitlines()) == 2
  assert (pod.workers / "output" / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--status", "--stop"], "give at most one of --detach, --status and --stop"),
    ([], "--script must be given"),
    (["--script=/nowhere.sh"], "--script: no such file: /nowhere.sh"),
    (["--status", "--env=A"], "--env expects NAME=VALUE, got 'A'"),
  ],
)
def test_invalid_flags_are_reported_before_anything_is_sent(pod, arguments, message):
  code, _, stderr = pod.run(*arguments)
  assert code == 2 and stderr == f"error: {message}\n"
  assert not (pod.workers / "calls").exists()


def test_errors_of_gcloud_are_reported(pod):
  code, _, stderr = pod.run("--status", tpu="bod")
  assert code == 1
  assert stderr == "error: cannot describe bod: ERROR: there is no such TPU\n"
