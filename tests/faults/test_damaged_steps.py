"""Steps whose files were damaged on disk."""

import gc
import os
import shutil

import pytest

from ll3m.core import checkpoint, checksums
from tests.faults.causing import REPETITIONS, delete, files, flip, truncate
from tests.tiny_runs import arrays

# Files that are never read: neither the model nor the run depends on them.
UNREAD = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize("fault", [flip, truncate, delete])
def test_previous_step_is_opened_whichever_file_is_damaged(copy, chance, caplog, fault):
  step = copy / "checkpoints" / "30"
  whole = files(step)
  assert len(whole) > 20
  for name in whole:
    for _ in range(1 if fault is delete else REPETITIONS):
      caplog.clear()
      fault(step / name, chance)
      opened = checkpoint.open_checkpoint(copy)
      if name in UNREAD:
        assert opened.step == 30
      elif name == checksums.FILE and fault is delete:
        assert opened.step == 30 and "not verified" in caplog.text
      else:
        assert opened.step == 20, name
        assert f"skipping step 30 of {copy}: " in caplog.text
        with pytest.raises(ValueError, match="checkpoint"):
          checkpoint.open_checkpoint(step)
      (step / name).write_bytes(whole[name])
  assert checkpoint.open_checkpoint(copy).step == 30


# Reads that Orbax abandons after an error cause warnings when they are garbage-collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_bit_in_the_weights_is_detected_only_by_digests(copy):
  """Without digests, Orbax and TensorStore read the damaged array without an error."""
  step = copy / "checkpoints" / "30"
  before, silent = arrays(step), 0
  chunks = [f for f in (step / "params").rglob("d/*") if f.stat().st_size > 4000]
  for chunk in chunks:
    whole = chunk.read_bytes()
    for place in range(100, len(whole), len(whole) // 40):
      data = bytearray(whole)
      data[place] ^= 1
      chunk.write_bytes(data)
      try:
        silent += arrays(step) != before
      except Exception:  # Orbax checks some bytes
        continue
      with pytest.raises(ValueError, match=f"{chunk.name} .*checksum"):
        checkpoint.open_checkpoint(step)
    chunk.write_bytes(whole)
  gc.collect()  # here rather than in a later test
  assert silent


def test_run_with_only_damaged_steps_fails_and_changes_nothing(
  copy, chance, run_command, arguments
):
  for step in (10, 20, 30):
    flip(copy / "checkpoints" / str(step) / "meta" / "metadata", chance)
  before = files(copy)
  more = ("--total_steps=40", f"--logger.output_dir={copy}")
  done = run_command("train", *arguments, *more)
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith(
    f"error: not a complete checkpoint: {copy} holds no good step"
  )
  assert files(copy) == before


def test_resume_from_an_earlier_step_has_the_same_result(start, copy, finished, tmp_path, chance):
  shutil.rmtree(copy / "checkpoints" / "20")  # two in a row: one damaged, one gone
  chunk = max((copy / "checkpoints" / "30" / "optimizer").rglob("d/*"), key=os.path.getsize)
  flip(chunk, chance)
  damaged = files(copy / "checkpoints" / "30")
  with start(copy, "--total_steps=30", "--save_model_freq=10") as job:
    assert job.end() == 0, job.said()
  assert f"skipping step 30 of {copy}: damaged checkpoint" in job.said()
  assert "resuming from step 10" in job.said()
  assert f"moved the damaged step 30 to {copy / 'damaged' / '30'}" in job.said()
  assert files(copy / "damaged" / "30") == damaged  # even damaged files are not deleted
  assert arrays(copy / "checkpoints" / "30") == arrays(finished / "checkpoints" / "30")


def test_verification_can_be_disabled(copy, chance, run_command):
  chunk = max((copy / "checkpoints" / "30" / "optimizer").rglob("d/*"), key=os.path.getsize)
  flip(chunk, chance)
  output = copy.parent / "exported"
  arguments = (f"--checkpoint={copy / 'checkpoints' / '30'}", f"--output_dir={output}")
  done = run_command("export", *arguments)
  assert done.returncode == 1 and not output.exists()
  assert f"damaged checkpoint {copy}/checkpoints/30: optimizer/" in done.stderr.splitlines()[-1]
  done = run_command("export", *arguments, "--verify=False")
  assert done.returncode == 0, done.stderr
