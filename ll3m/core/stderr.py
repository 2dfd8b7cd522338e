"""What stands on stderr: not TensorFlow's start-up chatter, but always a process's last words."""

import contextlib
import os
import sys
import tempfile
import threading
import typing
from collections.abc import Iterator

# What TensorFlow 2.21 prints from C++ while it is imported, whatever TF_CPP_MIN_LOG_LEVEL says.
_CHATTER = (
  b"WARNING: All log messages before absl::InitializeLog()",
  b"port.cc:",
  b"cudart_stub.cc:",
  b"cuda_platform.cc:",
)

# Where what is written to file descriptor 2 should end up; another one while that is held back.
_stderr = 2
_lock = threading.Lock()


@contextlib.contextmanager
def tensorflow_import() -> Iterator[None]:
  """Holds back what is written to stderr meanwhile, and passes on all but the chatter."""
  global _stderr
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  sys.stderr.flush()
  with tempfile.TemporaryFile() as held:
    with _lock:
      _stderr = os.dup(2)
      os.dup2(held.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      with _lock:
        os.dup2(_stderr, 2)
        os.close(_stderr)
        _stderr = 2
      held.seek(0)
      os.write(2, b"".join(x for x in held if not any(chatter in x for chatter in _CHATTER)))


def tell(text: str) -> None:
  """Writes a line at once from any thread; see `leave`."""
  with _lock:
    # A bar stands at the end of its line, and so does the ^C that a terminal shows.
    os.write(_stderr, f"{chr(10) if os.isatty(_stderr) else ''}{text}\n".encode())


def leave(last_words: str, code: int) -> typing.NoReturn:
  """Ends the process at once from any thread, with a line on stderr.

  Args:
    last_words: the line, without its end. It is written past `sys.stderr`, which a thread may hold
      that waits for ever, and past what is held back.
    code: the process's exit code.
  """
  with _lock:
    os.write(_stderr, f"{last_words}\n".encode())
    os._exit(code)
