"""One job per output folder."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

import jax
import tensorstore as ts
from absl import logging
from etils import epath

from ll3m.core import stderr
from ll3m.core.bucket_lease import PATIENCE, HeldError, lease
from ll3m.core.object_store import is_remote

_FILE = ".claim"
# What network file systems answer that are mounted without locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def claim(output_dir: epath.PathLike) -> Iterator[None]:
  """Holds a folder, which is made if it has to be, against every other job.

  The operating system lets go of it when the process ends, in whatever way; the file may stay. Of
  several processes the first holds it for all. Object stores know no locks: there, a lease is held
  instead. Nor do some file systems: there, nothing is held, and that is told.

  Raises:
    ValueError: another job holds it.
  """
  if jax.process_index():
    yield
    return
  if is_remote(output_dir):
    with _claim_remote(os.fspath(output_dir)):
      yield
    return
  path = epath.Path(output_dir) / _FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise _refusal(output_dir, file.read().strip() or "just starting") from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      logging.warning(
        "%s is on a file system without locks (%s): another job in it would not be noticed",
        output_dir,
        error.strerror,
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


@contextlib.contextmanager
def _claim_remote(output_dir: str) -> Iterator[None]:
  """Holds a folder of an object store; ends the process when another job has taken it over."""

  def lost() -> None:
    reason = (
      f"another job has taken {output_dir} over, for which this one gave no sign of life for "
      f"{PATIENCE:.0f} s"
    )
    stderr.leave(f"error: {reason}", 1)

  store = ts.KvStore.open(output_dir.rstrip("/") + "/").result()
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(lease(store, _FILE, lost=lost))
    except HeldError as error:
      raise _refusal(output_dir, str(error)) from None
    yield


def _refusal(output_dir: epath.PathLike, holder: str) -> ValueError:
  return ValueError(
    f"another job writes to {output_dir} ({holder}); give this one a folder of its own"
  )
