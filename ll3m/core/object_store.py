"""Access to object stores (gs://), and errors of writing to them and to disks.

etils reads and writes objects through TensorFlow's file system, Orbax and `parameter_store` through
TensorStore. An object appears whole or not at all. Object stores cannot rename a folder atomically,
append, or lock (see `bucket_lease`).
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
# TensorFlow's message for a failed request, with the response's JSON in its middle.
_ANSWER = re.compile(r"HTTP response code (\d+) with body '(.*)'(?:\s+when (.*))?", re.DOTALL)
# OS errors caused by the destination rather than by us.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MESSAGE = re.compile(r'"message":\s*"([^"]*)"')


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path is in an object store."""
  return "://" in os.fspath(path)


def prepare(arguments: Iterable[str]) -> None:
  """Imports TensorFlow if an argument, or the data's default folder, is in an object store.

  The first access to a remote path would import it anyway, but print its start-up messages.
  """
  if any(_SCHEME in text for text in (*arguments, os.environ.get("LL3M_DATA_DIR", ""))):
    with stderr.tensorflow_import():
      backend.tf_backend.tf  # noqa: B018 - a property that imports


def require_bucket(path: epath.PathLike) -> None:
  """Checks that the bucket of a path exists; without it, TensorFlow's makedirs never returns.

  Raises:
    FileNotFoundError: The bucket does not exist.
  """
  if is_remote(path):
    bucket = "/".join(os.fspath(path).split("/")[:3])
    if not epath.Path(bucket).exists():
      raise FileNotFoundError(f"there is no bucket {bucket}")


@contextlib.contextmanager
def writing(folder: epath.PathLike) -> Iterator[None]:
  """Adds the folder's name to errors of a full disk.

  The operating system names a file only if opening it fails; a full disk fails later.

  Raises:
    OSError: The operating system's error, with the folder's name.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(folder)) from error


def explain(text: str) -> str | None:
  """Returns a sentence for an error of TensorFlow's file system; None for any other error.

  Args:
    text: The message of the error.
  """
  if not (answer := _ANSWER.search(text)):
    return None
  code, body, doing = answer.groups()
  message = _MESSAGE.search(body)
  reason = message[1] if message else " ".join(body.split()) or "no reason was given"
  where = f"failed when {' '.join(doing.split())}" if doing else "failed"
  return f"Google Cloud Storage {where}: {reason} (HTTP {code})"
