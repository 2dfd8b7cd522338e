"""Control of stderr: hides TensorFlow's start-up messages, always prints the final message."""

import contextlib
import os
import sys
import tempfile
import threading
import typing
from collections.abc import Iterator

# Messages that TensorFlow 2.21 prints from C++ on import, regardless of TF_CPP_MIN_LOG_LEVEL.
_CHATTER = (
  b"WARNING: All log messages before absl::InitializeLog()",
  b"port.cc:",
  b"cudart_stub.cc:",
  b"cuda_platform.cc:",
)

# The descriptor of the real stderr; not 2 while the output of descriptor 2 is held back.
_stderr = 2
_lock = threading.Lock()


@contextlib.contextmanager
def tensorflow_import() -> Iterator[None]:
  """Holds back output to stderr, then prints it without TensorFlow's start-up messages."""
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
  """Writes a line at once, from any thread; see `leave`."""
  with _lock:
    # On a terminal, a progress bar or ^C may occupy the current line.
    os.write(_stderr, f"{chr(10) if os.isatty(_stderr) else ''}{text}\n".encode())


def leave(last_words: str, code: int) -> typing.NoReturn:
  """Ends the process at once, from any thread, with a line on stderr.

  Args:
    last_words: The line, without its line break. It bypasses `sys.stderr`, whose lock a blocked
      thread may hold, and output that is held back.
    code: The process's exit code.
  """
  with _lock:
    os.write(_stderr, f"{last_words}\n".encode())
    os._exit(code)
