"""Where things are written, object stores (gs://) above all: what is needed, and what went wrong.

etils reads and writes them through TensorFlow's file system, Orbax and `parameter_store` through
TensorStore. An object appears whole or not at all; what object stores lack are renaming of a
folder at once, appending, and locks (see `bucket_lease`).
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator

from etils import epath
from etils.epath import backend

from ll3m.core import stderr

_SCHEME = "gs://"
# What TensorFlow makes of an answer that is no success: the answer's JSON is in the middle of it.
_ANSWER = re.compile(r"HTTP response code (\d+) with body '(.*)'(?:\s+when (.*))?", re.DOTALL)
# Of what the operating system fails with, that which is the folder's fault.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MESSAGE = re.compile(r'"message":\s*"([^"]*)"')


def is_remote(path: epath.PathLike) -> bool:
  """Says whether a path is in an object store."""
  return "://" in os.fspath(path)


def prepare(arguments: Iterable[str]) -> None:
  """Loads TensorFlow if an argument, or the data's default folder, lies in an object store.

  The first path that is looked at would load it too, but not without its chatter.
  """
  if any(_SCHEME in text for text in (*arguments, os.environ.get("LL3M_DATA_DIR", ""))):
    with stderr.tensorflow_import():
      backend.tf_backend.tf  # noqa: B018 - a property that imports


def require_bucket(path: epath.PathLike) -> None:
  """Demands that the bucket of a path exists: without it, TensorFlow's makedirs does not return.

  Raises:
    FileNotFoundError: it does not exist.
  """
  if is_remote(path):
    bucket = "/".join(os.fspath(path).split("/")[:3])
    if not epath.Path(bucket).exists():
      raise FileNotFoundError(f"there is no bucket {bucket}")


@contextlib.contextmanager
def writing(folder: epath.PathLike) -> Iterator[None]:
  """Names the folder to which no more could be written, which the operating system does not.

  It names a file only when that is opened: a disk that is full shows later.

  Raises:
    OSError: with the folder's name.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(folder)) from error


def explain(text: str) -> str | None:
  """Returns what an error of TensorFlow's file system says; None if the text is none.

  Args:
    text: the error's.
  """
  if not (answer := _ANSWER.search(text)):
    return None
  code, body, doing = answer.groups()
  message = _MESSAGE.search(body)
  reason = message[1] if message else " ".join(body.split()) or "no reason was given"
  where = f"failed when {' '.join(doing.split())}" if doing else "failed"
  return f"Google Cloud Storage {where}: {reason} (HTTP {code})"
