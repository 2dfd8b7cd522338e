"""Runs a script on every worker of a TPU VM, through gcloud.

  python tools/tpu_run.py --tpu=NAME --script=tools/recipes/llama2_7b_wikipedia.sh --zone=us-east5-a

Sends the checkout's tracked files and the script, installs the pinned requirements, and starts the
script on all workers with LL3M_WORKER (from 0) and LL3M_WORKERS set. Each worker's output is shown
with the worker's number and written to a file. If a worker fails, or on Ctrl-C, the other workers
are stopped; the exit code is that of the first failure. No credentials are sent, because workers
have their own.

  --detach starts the script and returns, --status shows its state, and --stop ends it.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from ll3m.core import flags, options

ROOT = Path(__file__).resolve().parents[1]

# Folder in a worker's home for the archive, `code`, and the run's `log`, `pid` and `exit`.
_FOLDER = "ll3m_run"
_SCRIPT = "tpu_run_script.sh"
# Seconds to wait for the final output of a stopped worker.
_LAST_WORDS = 5
_INSTALL = "make --silent .venv/installed-train .venv/installed-tpu"

# The script of a worker, whose own shell expands nothing else. The run is a separate session, so it
# survives a lost connection, and --stop ends its process group and nothing else. Installation,
# which may take minutes, is part of the run.
_START = """set -eu
cd "$HOME/{folder}"
rm -f pid exit
: > log
export LL3M_WORKER={worker} LL3M_WORKERS={workers}
{exports}
setsid bash -c {run} > log 2>&1 < /dev/null &
until [ -s pid ]; do sleep 0.1; done
"""
_RUN = """echo $$ > pid
(
  mkdir -p code
  find code -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {{}} +
  tar -xzf code.tgz -C code && cd code && bash -ec {install} &&
    PATH="$PWD/.venv/bin:$PATH" bash {script}
)
echo $? > exit
"""
_FOLLOW = """tail --quiet --lines=+1 --sleep-interval=0.2 --pid=$! --follow log
cat exit > /dev/null 2>&1 || exit 143
exit "$(cat exit)"
"""
_BUSY = """cd "$HOME/{folder}" 2>/dev/null && [ -e pid ] || exit 0
kill -0 -- "-$(cat pid)" 2>/dev/null && echo busy || true
"""
_STATUS = """cd "$HOME/{folder}" 2>/dev/null && [ -e pid ] || {{ echo "no run"; exit 0; }}
if [ -e exit ]; then echo "ended with exit code $(cat exit)"
elif kill -0 -- "-$(cat pid)" 2>/dev/null; then echo "running"
else echo "stopped"; fi
tail --lines=3 log
"""
_STOP = """cd "$HOME/{folder}" 2>/dev/null && [ -e pid ] || exit 0
group="-$(cat pid)"
for signal in TERM KILL; do
  kill -s "$signal" -- "$group" 2>/dev/null || exit 0
  for second in $(seq {grace}); do kill -0 -- "$group" 2>/dev/null || exit 0; sleep 1; done
done
"""


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """Flags of the command."""

  tpu: str | None = options.option(None, "Name of the TPU VM.")
  script: str | None = options.option(
    None, "Bash script to run in the checkout's folder on each worker."
  )
  zone: str | None = options.option(None, "Zone of the TPU VM; gcloud's default if not given.")
  project: str | None = options.option(
    None, "Project of the TPU VM; gcloud's default if not given."
  )
  env: tuple[str, ...] = options.option(
    (), "Environment variable of the script, as NAME=VALUE; may be repeated.", repeated=True
  )
  install: str = options.option(_INSTALL, "Command that installs requirements; empty for none.")
  output_dir: str = options.option("runs/tpu", "Local folder for the workers' output.")
  detach: bool = options.option(False, "Start the script and return immediately.")
  status: bool = options.option(False, "Show the state of the script on every worker.")
  stop: bool = options.option(False, "End the script on every worker.")
  grace: int = options.option(
    60, "Seconds between asking a script to end and killing it, e.g. to save a checkpoint."
  )

  def __post_init__(self):
    options.require(self, "tpu")
    if sum((self.detach, self.status, self.stop)) > 1:
      raise ValueError("give at most one of `detach`, `status` and `stop`")
    if not (self.status or self.stop):
      options.require(self, "script")
      if not Path(self.script).is_file():
        raise ValueError(f"`script`: no such file: {self.script}")
    for item in self.env:
      if not item.partition("=")[0].isidentifier() or "=" not in item:
        raise ValueError(f"`env` expects NAME=VALUE, got {item!r}")
    if self.grace < 1:
      raise ValueError(f"`grace` must be at least 1, got {self.grace}")


class Tpu:
  """A TPU VM, accessed through gcloud."""

  def __init__(self, options: RunOptions):
    """Selects the TPU VM by its name, zone and project."""
    self._name = options.tpu
    self._where = [f"--{n}={v}" for n in ("zone", "project") if (v := getattr(options, n))]

  def _command(self, verb: str, *arguments: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *arguments, *self._where]

  def count_workers(self) -> int:
    """Returns the number of workers.

    Raises:
      ValueError: The program gcloud is not installed, or fails.
    """
    try:
      done = subprocess.run(
        self._command("describe", self._name, "--format=json"), capture_output=True, text=True
      )
    except FileNotFoundError as error:
      raise ValueError(
        "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
      ) from error
    if done.returncode:
      raise ValueError(f"cannot describe {self._name}: {done.stderr}")
    return len(json.loads(done.stdout)["networkEndpoints"])

  def send(self, archive: Path) -> None:
    """Copies the archive to every worker.

    Raises:
      ValueError: The copy fails.
    """
    self.run("all", f'mkdir -p "$HOME/{_FOLDER}"')
    target = f"{self._name}:{_FOLDER}/code.tgz"
    done = subprocess.run(
      self._command("scp", str(archive), target, "--worker=all"), capture_output=True, text=True
    )
    if done.returncode:
      raise ValueError(f"cannot copy the code to {self._name}: {done.stderr}")

  def run(self, worker: int | str, script: str) -> str:
    """Runs a short script on a worker, or on all, and returns its output.

    Raises:
      ValueError: The script fails.
    """
    done = subprocess.run(
      self._ssh(worker, script), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
      raise ValueError(f"worker {worker} of {self._name}: {done.stderr or done.stdout}")
    return done.stdout

  def start(self, worker: int, script: str) -> subprocess.Popen:
    """Starts a script on a worker; both output streams are piped together as text."""
    return subprocess.Popen(
      self._ssh(worker, script), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, errors="replace",
      start_new_session=True,  # Ctrl-C reaches only this program, which then stops the run
    )  # fmt: skip

  def _ssh(self, worker: int | str, script: str) -> list[str]:
    return self._command(
      "ssh", self._name, f"--worker={worker}", f"--command=bash -c {shlex.quote(script)}"
    )


FLAG_GROUPS = {"": RunOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a script on a TPU VM; see `flags.call` for `argv` and the returned exit code."""
  return flags.call(_run, FLAG_GROUPS, argv, doc=__doc__)


def _run(given: flags.Flags) -> int:
  """Performs the requested action; returns the script's exit code if it waits for the script."""
  options = given[""]
  tpu = Tpu(options)
  workers = range(tpu.count_workers())
  if options.stop:
    stop(tpu, workers, options)
  elif options.status:
    for worker in workers:
      _show(worker, tpu.run(worker, _STATUS.format(folder=_FOLDER)).splitlines(), None)
  else:
    # Check before sending anything: a failed start would stop the run of someone else.
    if busy := [w for w in workers if tpu.run(w, _BUSY.format(folder=_FOLDER)).strip()]:
      raise ValueError(
        f"a run is still active on worker {', '.join(map(str, busy))} of {options.tpu}; end it "
        f"with --stop"
      )
    with tempfile.TemporaryDirectory() as folder:
      tpu.send(pack(Path(folder) / "code.tgz", options.script))
    scripts = [_start_script(options, worker, len(workers)) for worker in workers]
    return run_all(tpu, scripts, options)
  return 0


def pack(archive: Path, script: str) -> Path:
  """Writes the current contents of the checkout's tracked files and the script to an archive."""
  listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
  with tarfile.open(archive, "w:gz") as tar:
    for name in {*filter(None, listed.stdout.decode().split("\0"))} - {_SCRIPT}:
      if (ROOT / name).exists():  # a deletion may not be committed yet
        tar.add(ROOT / name, arcname=name)
    tar.add(script, arcname=_SCRIPT)
  return archive


def run_all(tpu: Tpu, scripts: Sequence[str], options: RunOptions) -> int:
  """Runs a script on each worker and shows the output.

  Returns:
    0, or the exit code of the first worker that failed.
  """
  log_dir = Path(options.output_dir) / options.tpu
  log_dir.mkdir(parents=True, exist_ok=True)
  failures: list[int] = []
  changed = threading.Condition()
  ended = 0

  def follow(worker: int, process: subprocess.Popen) -> None:
    nonlocal ended
    with open(log_dir / f"worker-{worker}.log", "w") as file:
      _show(worker, process.stdout, file)
    code = process.wait()
    with changed:
      ended += 1
      if code:
        failures.append(code)
        print(f"worker {worker} ended with exit code {code}", file=sys.stderr, flush=True)
      changed.notify()

  processes = [tpu.start(worker, script) for worker, script in enumerate(scripts)]
  for worker, process in enumerate(processes):
    threading.Thread(target=follow, args=(worker, process), daemon=True).start()
  try:
    with changed:
      while ended < len(processes) and not failures:
        changed.wait()
  except KeyboardInterrupt:
    print("stopping all workers", file=sys.stderr, flush=True)
    end(tpu, processes, options)
    return 130
  if failures and not options.detach:
    end(tpu, processes, options)
  for process in processes:
    process.wait()
  return failures[0] if failures else 0


def end(tpu: Tpu, processes: Sequence[subprocess.Popen], options: RunOptions) -> None:
  """Stops the runs that these processes have started or are about to start."""
  workers = range(len(processes))
  stop(tpu, workers, options)
  for process in processes:
    # A stopped run may still write output. A run that has not reached its worker is cancelled.
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_LAST_WORDS)
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGTERM)
  stop(tpu, workers, options)  # runs that were started in between


def stop(tpu: Tpu, workers: Sequence[int], options: RunOptions) -> None:
  """Ends the run on all workers: sends SIGTERM, and SIGKILL after the grace period.

  Raises:
    ValueError: A worker could not be reached; the others were stopped.
  """
  script = _STOP.format(folder=_FOLDER, grace=options.grace)
  with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
    asked = [pool.submit(tpu.run, worker, script) for worker in workers]
  for future in asked:
    future.result()


def _start_script(options: RunOptions, worker: int, workers: int) -> str:
  exports = []
  for item in options.env:
    name, _, value = item.partition("=")
    exports.append(f"export {name}={shlex.quote(value)}")
  run = _RUN.format(install=shlex.quote(options.install), script=_SCRIPT)
  start = _START.format(
    folder=_FOLDER,
    run=shlex.quote(run),
    worker=worker,
    workers=workers,
    exports="\n".join(exports),
  )
  return start if options.detach else start + _FOLLOW


def _show(worker: int, lines: Iterable[str], file: IO[str] | None) -> None:
  for line in lines:
    text = line.rstrip("\n")
    print(f"[worker {worker}] {text}", flush=True)
    if file is not None:
      print(text, file=file, flush=True)


if __name__ == "__main__":
  sys.exit(main())
