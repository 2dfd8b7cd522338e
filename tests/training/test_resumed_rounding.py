"""bfloat16 parameters across a save and a resume, and the memory of their optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ll3m import families
from ll3m.core import checkpoint, sharding
from ll3m.core.checkpoint_manager import CheckpointerConfig, RunCheckpoints
from ll3m.data.batch import Batch
from ll3m.training.config import TrainOptions
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.program import make_program
from ll3m.training.sharded_batches import to_devices
from ll3m.training.train_state import bytes_per_device

FAMILY, PRESET = families.get_preset("llama2_7b")
CONFIG = PRESET.replace(
  vocab_size=64, d_model=32, d_ff=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
  max_positions=32,
)  # fmt: skip
KEY = jax.random.key(0)


def program(update, mesh):
  options = TrainOptions(param_dtype="bf16", total_steps=10)
  return make_program(options, OptimizerConfig(bf16_update=update), CONFIG, mesh)


def batch(step, mesh):
  tokens = np.random.default_rng(step).integers(0, 64, (1, 8, 17), dtype=np.int32)
  ones = np.ones((1, 8, 16), np.int32)
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), (1, 8, 16)).copy()
  rows = Batch(tokens[..., :-1], tokens[..., 1:], np.float32(ones), ones, positions)
  return to_devices(rows, mesh)


def train(made, mesh, state, steps):
  for step in steps:
    state, _ = made.step(state, batch(step, mesh))
  return state


@pytest.mark.parametrize("update", ["stochastic", "master"])
def test_resume_is_bitwise_with_bfloat16_parameters(update, tmp_path):
  mesh = sharding.make_mesh("2,2,2")
  made = program(update, mesh)
  plan, rng = made.plan, jax.random.key_data(KEY)
  expected = train(made, mesh, plan.start(plan.init(KEY), rng), range(4))
  state = train(made, mesh, plan.start(plan.init(KEY), rng), range(2))
  meta = checkpoint.model_meta(FAMILY.name, CONFIG) | {"step": 2, "rng": rng.tolist()}
  with RunCheckpoints(tmp_path, CheckpointerConfig()) as saved:
    saved.save(2, params=state.params, opt_state=state.opt_state, meta=meta, dataset={})
  resumed = checkpoint.open_checkpoint(tmp_path).restore_state(plan.state)
  resumed = train(made, mesh, resumed, range(2, 4))
  jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_a_master_copy_starts_at_full_precision():
  made = program("master", sharding.make_mesh("1,1,8"))
  assert made.plan.start_dtype == jnp.float32
  wide = made.plan.init(KEY)
  kept = jax.tree.map(np.asarray, wide)
  assert any((x != x.astype(jnp.bfloat16)).any() for x in jax.tree.leaves(kept))
  state = made.plan.start(wide, jax.random.key_data(KEY))
  jax.tree.map(np.testing.assert_array_equal, state.opt_state.master, kept)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), kept)
  jax.tree.map(np.testing.assert_array_equal, state.params, rounded)


@pytest.mark.parametrize(
  ("update", "bytes_of_a_parameter"), [("nearest", 4), ("stochastic", 4), ("master", 12)]
)
def test_the_optimizer_state_takes_the_bytes_that_the_help_states(update, bytes_of_a_parameter):
  """A parameter takes 2 more bytes itself; `ll3m.plan` adds up the same numbers."""
  plan = program(update, sharding.make_mesh("8,1,1")).plan
  assert bytes_per_device(plan.params) == 2 * plan.count()
  counters = bytes_per_device(plan.state.opt_state) - bytes_of_a_parameter * plan.count()
  assert 0 <= counters < 64
