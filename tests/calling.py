"""Calls commands within the test process, for tests that need no process of their own."""

import contextlib
import importlib
import io
import os
import subprocess
import warnings
from unittest import mock

import jax

_devices = jax.devices


def call(verb: str, *arguments: object) -> subprocess.CompletedProcess:
  """Calls `ll3m.VERB` with a command line, on one of the eight CPU devices.

  Args:
    verb: The command.
    *arguments: The command's flags.

  Returns:
    The exit code and output of the command, as `subprocess.run` would.
  """
  command = importlib.import_module(f"ll3m.{verb}")
  out, err = io.StringIO(), io.StringIO()
  with (
    mock.patch.object(jax, "devices", lambda *backend: _devices(*backend)[:1]),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("default")  # as in a separate process
    code = command.main([os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in arguments])
  return subprocess.CompletedProcess([verb, *arguments], code, out.getvalue(), err.getvalue())
