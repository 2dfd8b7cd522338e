"""Checkpoints of a run: retention, restoring, and folders that are refused."""

import json
import os
import shutil
import threading
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ll3m import families
from ll3m.core import checkpoint, checkpoint_items, checkpoint_manager, checksums
from ll3m.core.checkpoint_manager import CheckpointerConfig, RunCheckpoints
from ll3m.training.step import TrainState

CONFIG = families.get_preset("llama2_7b").config
PARAMS = {
  "layers/attention/query": {"w": jnp.arange(6.0).reshape(2, 3)},
  "embed": {"e": jnp.ones(2)},
}
STATE = optax.adam(0.1).init(PARAMS)
RNG = np.array([3, 2**32 - 5], np.uint32)


def save(checkpoints, step):
  checkpoints.save(
    step,
    params=PARAMS,
    opt_state=STATE,
    meta=checkpoint.model_meta("llama", CONFIG) | {"step": step, "rng": RNG.tolist()},
    dataset={"shard": b"\x00position %d" % step},
  )


def like(tree):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def restore(path, params, opt_state):
  """Restores a step folder for a run with these parameters and this optimizer state."""
  state = TrainState(np.int32(0), params, opt_state, RNG)
  return checkpoint.open_checkpoint(path, verify=False).restore_state(like(state))


def test_latest_and_milestone_steps_are_kept(tmp_path):
  with RunCheckpoints(tmp_path, CheckpointerConfig(max_to_keep=2), milestone_steps=4) as saved:
    for step in range(1, 8):
      save(saved, step)
  assert checkpoint.finished_steps(tmp_path) == [4, 6, 7]
  for foreign in ("8.txt", "08", "best"):
    (tmp_path / "checkpoints" / foreign).mkdir()
  assert checkpoint.list_steps(tmp_path) == (tmp_path / "checkpoints", [4, 6, 7], [])
  assert checkpoint.open_checkpoint(tmp_path).step == 7


def test_restoring_is_exact(tmp_path):
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    save(saved, 3)
  restored = restore(tmp_path / "checkpoints" / "3", PARAMS, STATE)
  assert (restored.step, restored.step.dtype) == (3, jnp.int32)
  np.testing.assert_array_equal(restored.rng, RNG)
  assert jax.tree.structure(restored.opt_state) == jax.tree.structure(STATE)
  for ours, saved in ((restored.params, PARAMS), (restored.opt_state, STATE)):
    jax.tree.map(np.testing.assert_array_equal, ours, saved)
  assert checkpoint.open_checkpoint(tmp_path).dataset_state() == {"shard": b"\x00position 3"}
  params = checkpoint.open_checkpoint(tmp_path).load_params(dtype=jnp.bfloat16)
  assert params["layers/attention/query"]["w"].dtype == jnp.bfloat16


def test_differences_from_the_run_are_listed(tmp_path):
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    save(saved, 1)
  other = {"layers/attention/query": {"w": jnp.zeros((4, 3))}, "head": {"w": jnp.ones(1)}}
  with pytest.raises(ValueError, match="parameters differ") as error:
    restore(tmp_path / "checkpoints" / "1", other, STATE)
  for part in ("embed/e is not in the run", "head/w was not saved",
               "layers/attention/query/w is float32[2, 3], expected float32[4, 3]"):  # fmt: skip
    assert part in str(error.value)
  lion = optax.lion(0.1).init(PARAMS)
  with pytest.raises(ValueError, match="optimizer.* differ"):
    restore(tmp_path / "checkpoints" / "1", PARAMS, lion)


def test_resuming_with_another_dtype_is_refused(tmp_path):
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    save(saved, 1)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  with pytest.raises(ValueError, match=r"embed/e is float32\[2\], expected bfloat16\[2\]"):
    restore(tmp_path / "checkpoints" / "1", narrow, STATE)


def test_only_local_paths_are_made_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(checkpoint.absolute("runs/mine")) == str(tmp_path / "runs" / "mine")
  assert str(checkpoint.absolute("gs://bucket/runs")) == "gs://bucket/runs"


def test_step_without_optimizer_state_cannot_be_resumed(tmp_path):
  with RunCheckpoints(tmp_path, CheckpointerConfig(save_optimizer_state=False)) as saved:
    save(saved, 1)
  step = tmp_path / "checkpoints" / "1"
  with pytest.raises(ValueError, match="saved without the optimizer's state"):
    restore(step, PARAMS, STATE)
  with pytest.raises(ValueError, match="no data position was saved"):
    checkpoint.open_checkpoint(step).dataset_state()
  assert checkpoint.open_checkpoint(step).load_params().keys() == PARAMS.keys()


def test_incomplete_folders_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no such folder"):
    checkpoint.open_checkpoint(tmp_path / "nothing")
  with pytest.raises(ValueError, match="not a complete checkpoint: .* has no ll3m.json"):
    checkpoint.open_checkpoint(tmp_path)
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  with pytest.raises(ValueError, match="not a complete checkpoint: .* holds no good step"):
    checkpoint.open_checkpoint(tmp_path)
  (tmp_path / "ll3m.json").write_text('{"format": 1')
  (tmp_path / "checkpoints" / "5").rmdir()
  (tmp_path / "checkpoints").rmdir()
  with pytest.raises(ValueError, match="not a complete checkpoint: cannot read"):
    checkpoint.open_checkpoint(tmp_path)
  (tmp_path / "ll3m.json").write_text('{"format": 99}')
  with pytest.raises(ValueError, match="has format 99, expected 1"):
    checkpoint.open_checkpoint(tmp_path)


def test_kind_of_a_folder_does_not_depend_on_its_parents_name(tmp_path, monkeypatch):
  converted = tmp_path / "checkpoints" / "my-model"
  for folder in ("params", "tokenizer", "checkpoints"):  # the last one belongs to the user
    (converted / folder).mkdir(parents=True)
  (converted / "ll3m.json").write_text(json.dumps(checkpoint.model_meta("llama", CONFIG)))
  for path in (converted, converted.parent / "." / "my-model"):
    opened = checkpoint.open_checkpoint(path)
    assert (opened.path, opened.step) == (converted, None)
    assert opened.tokenizer_dir == converted / "tokenizer"
  # The folder above may be a run, too, with steps of its own.
  with pytest.raises(ValueError, match="holds no good step"):
    checkpoint.open_checkpoint(tmp_path)
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    save(saved, 3)
  (tmp_path / "tokenizer").mkdir()
  step = converted.parent / "3"
  (tmp_path / "elsewhere" / "checkpoints").mkdir(parents=True)
  link = tmp_path / "elsewhere" / "latest"
  link.symlink_to(step)
  monkeypatch.chdir(step)
  for path in (tmp_path, step, link, step / ".." / "3", "."):
    opened = checkpoint.open_checkpoint(path)
    assert opened.step == 3 and os.path.samefile(opened.tokenizer_dir, tmp_path / "tokenizer")
  # A copy of a step belongs to no run, even if a tokenizer is where a run's would be.
  copy = tmp_path / "copies" / "best"
  shutil.copytree(step, copy)
  opened = checkpoint.open_checkpoint(copy)
  assert (opened.step, opened.tokenizer_dir) == (3, None)


def test_converted_model_named_like_a_step_is_refused(tmp_path):
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  (tmp_path / "checkpoints" / "7" / "ll3m.json").write_text("{}")
  with pytest.raises(ValueError, match="checkpoints/7 is a converted model"):
    checkpoint.finished_steps(tmp_path)


@pytest.mark.parametrize("item", ["params", "optimizer"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_arrays_raise_one_short_sentence(tmp_path, item, damage):
  # One array per item: Orbax reads several concurrently, and reads that it abandons after the first
  # error raise unhandled exceptions in a later test.
  params = {"head": {"w": jnp.arange(6.0)}}
  state = {"momentum": jnp.ones(3)}
  meta = checkpoint.model_meta("llama", CONFIG) | {"step": 1, "rng": RNG.tolist()}
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    saved.save(1, params=params, opt_state=state, meta=meta, dataset={})
  step = tmp_path / "checkpoints" / "1"
  for chunk in (f for f in (step / item).glob("**/d/*") if f.is_file()):
    if damage == "cut":
      chunk.write_bytes(chunk.read_bytes()[:20])
    else:
      chunk.unlink()
  reads = [lambda: restore(step, params, state)]
  if item == "params":
    opened = checkpoint.open_checkpoint(tmp_path, verify=False)
    reads.append(lambda: opened.load_params())
  for read in reads:
    with pytest.raises(ValueError, match=f"^cannot read {step / item}: ") as error:
      read()
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "broken", "nothing in it"])
def test_unreadable_step_is_skipped_with_a_warning(tmp_path, caplog, damage):
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    save(saved, 1)
    save(saved, 2)
  meta = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
  if damage == "missing":
    shutil.rmtree(meta.parent)
  else:
    meta.write_text("{" if damage == "broken" else '{"format": 1}')
  assert checkpoint.open_checkpoint(tmp_path).step == 1
  assert f"skipping step 2 of {tmp_path}: not a complete checkpoint" in caplog.text
  with pytest.raises(ValueError, match="not a complete checkpoint"):
    checkpoint.open_checkpoint(tmp_path / "checkpoints" / "2")
  # A run that resumes from the previous step saves the damaged step again.
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    restore(tmp_path, PARAMS, STATE)
    saved.set_aside_after(1)
    save(saved, 2)
  assert (tmp_path / "damaged" / "2" / "params").is_dir()
  with (
    RunCheckpoints(tmp_path, CheckpointerConfig()) as saved,
    pytest.raises(FileExistsError, match="step 2 was saved by another job"),
  ):
    saved.set_aside_after(1)
  assert checkpoint.open_checkpoint(tmp_path).step == 2


def test_bug_during_a_save_is_reported_with_its_type(tmp_path):
  saved = RunCheckpoints(tmp_path, CheckpointerConfig())
  with (
    pytest.raises(OSError, match="step 3 .*: TypeError: .*not JSON serial"),
    saved,
  ):
    saved.save(3, params=PARAMS, opt_state=STATE, meta={"step": object()}, dataset={})


def test_failed_save_deletes_no_older_step_whenever_it_is_noticed(tmp_path, monkeypatch):
  """The run checks for errors after the save has failed, before Orbax's own thread has seen it."""
  checked = threading.Event()
  wait = ocp.CheckpointManager._wait_for_checkpointers

  def wait_later(manager):
    assert checked.wait(60)
    return wait(manager)

  with RunCheckpoints(tmp_path, CheckpointerConfig(max_to_keep=1)) as saved:
    save(saved, 1)
    saved._manager.wait_until_finished()
    monkeypatch.setattr(ocp.CheckpointManager, "_wait_for_checkpointers", wait_later)
    monkeypatch.setattr(checksums, "write", mock.Mock(side_effect=OSError("no space")))
    save(saved, 2)
    writer = next(thread for thread in threading.enumerate() if thread.name == "async_save")
    writer.join()
    try:
      saved.check()
    finally:
      checked.set()
    with pytest.raises(OSError, match="step 2 could not be saved.*no space"):
      while True:
        saved.check()
        time.sleep(0.01)
  assert checkpoint.finished_steps(tmp_path) == [1]


def test_damaged_steps_are_moved_after_all_processes_have_checked_them(tmp_path, monkeypatch):
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    for step in (1, 2, 3):
      save(saved, step)
  steps = tmp_path / "checkpoints"
  for step in (2, 3):
    (steps / str(step) / "meta" / "metadata").write_text("{")
  there = []
  monkeypatch.setattr(
    checkpoint_manager,
    "_meet",
    lambda where: there.append([(steps / str(step)).exists() for step in (2, 3)]),
  )
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    saved.set_aside_after(1)
  assert there == [[True, True], [False, False]]


def test_nested_names_round_trip():
  nested = checkpoint_items.nest(PARAMS)
  assert nested["layers"]["attention"]["query"]["w"] is PARAMS["layers/attention/query"]["w"]
  assert checkpoint_items.flatten(nested) == PARAMS
  with pytest.raises(ValueError, match="`max_to_keep` must be at least 1"):
    CheckpointerConfig(max_to_keep=0)
