"""A lock that admits one job per output folder."""

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
# Errors of network file systems that are mounted without locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def claim(output_dir: epath.PathLike) -> Iterator[None]:
  """Locks a folder against other jobs; creates it if necessary.

  The operating system releases the lock when the process ends, in whatever way; the lock's file may
  stay. Process 0 holds the lock for all processes of a run. Object stores have no locks, so a lease
  is held instead. On a file system without locks, nothing is held and a warning is logged.

  Raises:
    ValueError: Another job holds the lock.
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
        "%s is on a file system without locks (%s); a second job here would not be detected",
        output_dir,
        error.strerror,
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


@contextlib.contextmanager
def _claim_remote(output_dir: str) -> Iterator[None]:
  """Holds the lease of a remote folder; ends the process if another job takes it over."""

  def lost() -> None:
    reason = (
      f"another job has taken over {output_dir}, because this one did not renew its lease for "
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
    f"another job writes to {output_dir} ({holder}); choose another folder for this one"
  )
