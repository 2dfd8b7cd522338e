"""One job per folder, even on a file system without locks."""

import errno
import os

import pytest

from ll3m.core import output_lock


def test_second_claim_is_refused_until_the_first_is_released(tmp_path):
  with (
    output_lock.claim(tmp_path / "run"),
    pytest.raises(ValueError, match=rf"another job writes to .*run \(process {os.getpid()} on "),
    output_lock.claim(tmp_path / "run"),
  ):
    pass
  with output_lock.claim(tmp_path / "run"):
    pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_file_system_without_locks_is_accepted_with_a_warning(
  tmp_path, monkeypatch, caplog, number
):
  def flock(file, operation):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(output_lock.fcntl, "flock", flock)
  if number == errno.EIO:  # a failure, not a lack of locks
    with pytest.raises(OSError, match="Input/output error"), output_lock.claim(tmp_path):
      pass
    return
  with output_lock.claim(tmp_path):
    assert f"{tmp_path} is on a file system without locks ({os.strerror(number)})" in caplog.text
