"""Files that a resumed run reads before its first step, counted by Python's audit hook."""

import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint
import pytest

import ll3m
from ll3m import families
from ll3m.core import checkpoint, sharding
from ll3m.core.checkpoint_manager import CheckpointerConfig, RunCheckpoints
from ll3m.data.config import DatasetConfig
from ll3m.training.config import TrainOptions
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.program import make_program
from ll3m.training.run import Run, find_start, fixed_settings, initial_state

FAMILY, PRESET = families.get_preset("llama2_7b")
CONFIG = PRESET.replace(
  vocab_size=64, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
  max_positions=32,
)  # fmt: skip
OURS, ORBAX = (str(Path(module.__file__).parent) for module in (ll3m, orbax.checkpoint))

watched: list[tuple[Path, collections.Counter]] = []


def audit(event, arguments):
  """Counts file accesses in the watched folder, by event, path and whether our code made them."""
  if not watched or event not in ("os.listdir", "os.scandir", "open"):
    return
  (folder, counts), path = watched[-1], str(arguments[0])
  if path.startswith(str(folder)):
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith((OURS, ORBAX)):
      frame = frame.f_back
    ours = frame is not None and frame.f_code.co_filename.startswith(OURS)  # None: Orbax's threads
    counts[event.removeprefix("os."), str(Path(path).relative_to(folder)), ours] += 1


@pytest.fixture(scope="module")
def watching():
  sys.addaudithook(audit)  # cannot be removed; it counts only within `watch`

  @contextlib.contextmanager
  def watch(folder):
    watched.append((folder, collections.Counter()))
    try:
      yield watched[-1][1]
    finally:
      watched.pop()

  return watch


def test_a_resumed_run_lists_each_folder_and_opens_its_step_once(tmp_path, watching):
  mesh = sharding.make_mesh("8,1,1")
  options, optimizer = TrainOptions(total_steps=10), OptimizerConfig()
  plan = make_program(options, optimizer, CONFIG, mesh).plan
  draw = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jax.device_put(draw.integers(0, 99, x.shape).astype(x.dtype), x.sharding), plan.state
  )
  settings = fixed_settings(options, optimizer, DatasetConfig())
  meta = checkpoint.model_meta("llama", CONFIG) | {"settings": settings}
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    for step in (3, 6):
      saved.save(
        step,
        params=state.params,
        opt_state=state.opt_state,
        meta=meta | {"step": step, "rng": np.asarray(state.rng).tolist()},
        dataset={"shard": b"position"},
      )
  run = mock.create_autospec(Run, instance=True, logger=mock.Mock(output_dir=tmp_path))
  with watching(tmp_path) as counts:
    start = find_start(options, str(tmp_path), settings)
    with RunCheckpoints(tmp_path, CheckpointerConfig(), unfinished=start.unfinished) as saved:
      run.resumed = start.resumed
      restored = initial_state(run, plan)
      saved.set_aside_after(start.resumed.step)
  assert start.dataset_state == {"shard": b"position"}
  jax.tree.map(np.testing.assert_array_equal, restored, state._replace(step=np.int32(6)))

  listed = {(path, ours): n for (what, path, ours), n in counts.items() if what != "open"}
  # glob lists the folder of the position, in which Orbax puts a file of its own.
  assert {path: n for (path, ours), n in listed.items() if ours} == {
    "checkpoints": 1, "checkpoints/6/dataset": 1,
  }  # fmt: skip
  # Orbax's manager lists the unfinished steps and then all steps; it accepts no list from us. Its
  # reader of arrays lists the files that each process wrote.
  assert listed.pop(("checkpoints", False)) <= 2
  assert set(listed.values()) == {1}, listed
  opened = {path: n for (what, path, ours), n in counts.items() if what == "open" and ours}
  # Each file is opened once for its checksum, and two of them once more for their content.
  twice = {"checkpoints/6/meta/metadata", "checkpoints/6/dataset/shard.state"}
  assert {path for path, n in opened.items() if n == 2} == twice
  assert opened.pop("checkpoints/6/digests.json") == 1
  assert max(opened.values()) == 2 and not any("checkpoints/3/" in path for path in opened)
