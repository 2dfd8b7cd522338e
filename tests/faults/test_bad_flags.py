"""Wrong flags give one sentence within 15 seconds, before weights or devices are used.

tests/test_train_flags.py has many more cases, in one process.
"""

import resource

import pytest


@pytest.mark.parametrize(
  ("changes", "status", "part"),
  [
    (["--optimizer.typ=adamw"], 2, "did you mean --optimizer.type?"),
    (["--mesh_dim=3,1,1"], 2, "needs 3 devices, there are 1"),
    (["--load_checkpoint=params::gs-bucket/none"], 1, "there is no such folder"),
  ],
)
def test_wrong_flag_is_reported_quickly(arguments, run_command, tmp_path, changes, status, part):
  names = {change.partition("=")[0] for change in changes}
  kept = [flag for flag in arguments if flag.partition("=")[0] not in names]
  began = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = run_command("train", *kept, *changes, f"--logger.output_dir={tmp_path / 'run'}")
  ended = resource.getrusage(resource.RUSAGE_CHILDREN)
  # CPU time, because wall time says nothing on a machine that is busy with other tests.
  assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 15
  assert done.returncode == status, done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: ") and part in last, last
  assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
