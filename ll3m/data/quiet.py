"""Keeps TensorFlow's start-up chatter out of a run's output."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

# What TensorFlow 2.21 prints from C++ while it is imported, whatever TF_CPP_MIN_LOG_LEVEL says.
_CHATTER = (
  b"WARNING: All log messages before absl::InitializeLog()",
  b"port.cc:",
  b"cudart_stub.cc:",
  b"cuda_platform.cc:",
)


@contextlib.contextmanager
def tensorflow_import() -> Iterator[None]:
  """Holds back what is written to stderr meanwhile, and passes on all but the chatter."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  sys.stderr.flush()
  stderr = os.dup(2)
  try:
    with tempfile.TemporaryFile() as held:
      os.dup2(held.fileno(), 2)
      try:
        yield
      finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        held.seek(0)
        lines = [line for line in held if not any(chatter in line for chatter in _CHATTER)]
        os.write(2, b"".join(lines))
  finally:
    os.close(stderr)
