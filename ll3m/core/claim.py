"""One job per output folder."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

_FILE = ".claim"
# What network file systems answer that are mounted without locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def claim(output_dir: epath.PathLike) -> Iterator[None]:
  """Holds a folder, which is made if it has to be, against every other job.

  The operating system lets go of it when the process ends, in whatever way; the file may stay. Of
  several processes the first holds it for all. Object stores, and some file systems, know no locks:
  there, nothing is held; of a file system that is told.

  Raises:
    ValueError: another job holds it.
  """
  if jax.process_index() or "://" in os.fspath(output_dir):
    yield
    return
  path = epath.Path(output_dir) / _FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ValueError(
        f"another job writes to {output_dir} ({file.read().strip() or 'just starting'}); give this "
        f"one a folder of its own"
      ) from None
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
