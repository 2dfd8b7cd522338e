"""Processes that start with all modules imported: forks of a server that only imports.

A command spends half of a tiny run on imports. The fork server of `multiprocessing` imports once,
before any jax backend or thread exists, and forks a child for each call. A child is an ordinary
process with its own environment, output, signals, limits and exit code.
"""

import atexit
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests.compiled import quickly

_folder = tempfile.TemporaryDirectory(prefix="ll3m-printed-")
_IMPORTED = (
  "ll3m.train",
  "ll3m.evaluate",
  "ll3m.generate",
  "ll3m.data.row_corpus",
  "tests.tensorflow_preloaded",
  "datasets",
  "matplotlib.pyplot",
  "tensorboardX",
  "tests.preloaded",
)


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(_IMPORTED))
  # jax reads these on import. Each child reads its own XLA_FLAGS.
  with mock.patch.dict(os.environ, quickly() | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}):
    forkserver.ensure_running()
  return context


class Command:
  """A running `python -m ll3m.VERB ARGUMENTS`, used like a `subprocess.Popen` with pipes."""

  def __init__(
    self,
    verb: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    compiles: bool = False,
  ):
    """Starts the process.

    Args:
      verb: The command.
      *arguments: The command's flags.
      env: The environment; the tests' environment by default.
      cwd: The working directory.
      log: The file for stdout and stderr; without one, `communicate` returns both.
      compiles: Whether to compile programs even if another process has already compiled them.
    """
    folder = None if log else Path(tempfile.mkdtemp(dir=_folder.name))
    paths = [log or folder / name for name in ("stdout", "stderr")]
    for path in paths:
      path.touch()
    self._paths = paths
    self._process = _server().Process(
      target=_run,
      args=(
        verb,
        arguments,
        dict(os.environ if env is None else env),
        cwd,
        *paths,
        compiles,
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
      ),
    )
    self._process.start()
    self.args = [verb, *arguments]
    self.pid = self._process.pid

  @property
  def returncode(self) -> int | None:
    return self._process.exitcode

  def poll(self) -> int | None:
    return self._process.exitcode

  def wait(self, timeout: float | None = None) -> int:
    self._process.join(timeout)
    if self._process.exitcode is None:
      raise subprocess.TimeoutExpired(self.args, timeout)
    return self._process.exitcode

  def communicate(self, timeout: float | None = None) -> tuple[str, str]:
    self.wait(timeout)
    return tuple(path.read_text() for path in self._paths)

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


def _run(
  verb: str,
  arguments: tuple[str, ...],
  env: dict[str, str],
  cwd: Path | None,
  out: Path,
  err: Path,
  compiles: bool,
  ignores_interrupts: bool,
) -> None:
  """Becomes the command, in the child; SIGINT is handled as in the test process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN if ignores_interrupts else signal.default_int_handler)
  for stream, number, path in ((sys.stdout, 1, out), (sys.stderr, 2, err)):
    with path.open("ab") as file:
      os.dup2(file.fileno(), number)
    stream.reconfigure(line_buffering=True)
  os.environ.clear()
  os.environ.update(env)
  if cwd is not None:
    os.chdir(cwd)
  sys.path.insert(0, os.getcwd())  # as `python -m` does
  import importlib

  import jax

  if compiles:
    jax.config.update("jax_compilation_cache_dir", None)
  sys.argv = [f"ll3m.{verb}", *arguments]
  code = importlib.import_module(f"ll3m.{verb}").main()
  atexit._run_exitfuncs()  # multiprocessing omits these; in them, jax's processes exit together
  sys.exit(code)
