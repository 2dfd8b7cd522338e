"""Properties that hold for any input: round trips and draws."""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ll3m import families
from ll3m.core import checkpoint, sharding
from ll3m.core.checkpoint_manager import CheckpointerConfig, RunCheckpoints
from ll3m.data.batch import Batch
from ll3m.decoding.sampling import Sampling, sample
from ll3m.families.tensor_rules import expected_tensors
from ll3m.hf.conversion import convert_model
from ll3m.hf.exporting import export_checkpoint
from ll3m.hf.model_files import open_model
from ll3m.hf.model_source import open_source
from ll3m.models.transformer import make_model
from ll3m.training.model_choice import build_model
from ll3m.training.optimizer import OptimizerConfig, make_optimizer
from ll3m.training.step import init_state, make_train_step
from ll3m.training.train_state import plan_state
from tests.faults.causing import SOAK

EXAMPLES = 200 if SOAK else 20


@st.composite
def models(draw):
  """Draws a family and an architecture that its config.json can express."""
  family, config = families.get_preset(
    draw(st.sampled_from(["llama2_7b", "mistral_7b", "gemma_2b", "phi_2", "smollm2_135m"]))
  )
  kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
  head_dim = 2 * draw(st.integers(1, 4))
  phi = family.name == "phi"  # Phi has no key for the size of a head
  heads = kv_heads * groups
  return family, config.replace(
    vocab_size=draw(st.integers(1, 40)),
    d_model=heads * head_dim * (1 if phi else draw(st.integers(1, 2))),
    d_ff=draw(st.integers(1, 30)),
    num_layers=draw(st.integers(1, 4)),
    num_heads=heads,
    num_kv_heads=heads if phi else kv_heads,
    head_dim=head_dim,
    max_positions=draw(st.integers(1, 99)),
    rotary_fraction=1.0 if phi else config.rotary_fraction,
    rope_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
  )


@given(
  model=models(),
  dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
  seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=not SOAK)
def test_converting_and_exporting_reproduces_the_file(model, dtype, seed):
  family, config = model
  draw = np.random.default_rng(seed)
  with tempfile.TemporaryDirectory() as folder:
    published, converted, exported = (Path(folder) / name for name in ("a", "b", "c"))
    published.mkdir()
    (published / "config.json").write_text(json.dumps(family.to_hf_config(config)))
    tensors = {
      name: draw.standard_normal(spec.shape).astype(dtype)
      for name, spec in expected_tensors(family.rules, config).items()
    }
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    convert_model(open_model(published), converted)
    opened = checkpoint.open_checkpoint(converted)
    assert opened.config == config
    export_checkpoint(opened, exported)
    assert open_model(exported).config == config
    theirs, ours = ((f / "model.safetensors").read_bytes() for f in (published, exported))
    assert ours == theirs


@given(
  logits=st.lists(st.one_of(st.floats(-1e4, 1e4, width=32), st.none()), min_size=8, max_size=8),
  temperature=st.sampled_from([0.0, 1e-30, 0.7, 1.0, 1e30]),
  top_k=st.sampled_from([0, 1, 3, 99]),
  top_p=st.sampled_from([1e-6, 0.5, 0.999, 1.0]),
  seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=5 * EXAMPLES, deadline=None, derandomize=not SOAK)
def test_a_masked_token_is_never_drawn(logits, temperature, top_k, top_p, seed):
  if all(value is None for value in logits):
    logits = [0.0, *logits[1:]]
  row = np.array([[-np.inf if value is None else value for value in logits]], np.float32)
  sampling = Sampling(temperature, top_k, top_p) if temperature else Sampling()
  token = int(
    sample(jnp.asarray(row), jnp.array([seed], jnp.uint32), jnp.zeros(1, jnp.int32), sampling)[0]
  )
  assert np.isfinite(row[0, token])
  if temperature == 0 or top_k == 1:
    assert row[0, token] == row.max()


MESHES = st.sampled_from([f"{a},{b},{8 // a // b}" for a in (1, 2, 4, 8) for b in (1, 2, 4, 8)
                          if a * b <= 8])  # fmt: skip


@given(
  model=models(),
  meshes=st.tuples(MESHES, MESHES),
  optimizer=st.sampled_from(["adamw", "lion", "adafactor"]),
  dtype=st.sampled_from(["f32", "bf16"]),
  update=st.sampled_from(["nearest", "master"]),
  seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=EXAMPLES // 2, deadline=None, derandomize=not SOAK)
def test_a_checkpoint_is_the_same_on_any_mesh(model, meshes, optimizer, dtype, update, seed):
  family, config = model
  rule = make_optimizer(OptimizerConfig(type=optimizer, bf16_update=update), 10)
  plans = []
  for mesh_dim in meshes:
    mesh = sharding.make_mesh(mesh_dim)
    plans.append(plan_state(build_model(config, mesh, dtype="f32"), rule, mesh, param_dtype=dtype))
  draw = np.random.default_rng(seed)
  before = jax.tree.map(
    lambda x: (100 * draw.standard_normal(x.shape)).astype(x.dtype), plans[0].state
  )
  placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), before, plans[0].state)
  with tempfile.TemporaryDirectory() as folder:
    with RunCheckpoints(folder, CheckpointerConfig()) as checkpoints:
      checkpoints.save(
        1,
        params=placed.params,
        opt_state=placed.opt_state,
        meta=checkpoint.model_meta(family.name, config)
        | {"step": 1, "rng": np.asarray(before.rng).tolist()},
        dataset={},
      )
    there = plans[1]
    after = checkpoint.open_checkpoint(folder).restore_state(there.state)
    loaded = open_source(folder).load_params(shardings=there.param_shardings)
    for found, wanted, like in (
      (after.params, before.params, there.params),
      (after.opt_state, before.opt_state, there.state.opt_state),
      (after.rng, before.rng, there.state.rng),
      (loaded, before.params, there.params),
    ):
      jax.tree.map(same, found, wanted, like)


def same(found, wanted, like):
  assert found.dtype == like.dtype and found.sharding.is_equivalent_to(like.sharding, found.ndim)
  assert np.asarray(found).tobytes() == wanted.tobytes()


TINY = families.get_preset("llama2_7b").config.replace(
  vocab_size=19, d_model=8, d_ff=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
  max_positions=8,
)  # fmt: skip
ROWS, LENGTH = 12, 5


@given(
  steps=st.sampled_from([2, 3, 4, 6, 12]),
  keep=st.lists(st.floats(0, 1), min_size=ROWS, max_size=ROWS),
  seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=not SOAK)
def test_any_split_into_micro_steps_gives_the_update_of_the_whole_batch(steps, keep, seed):
  """Rows keep any share of their targets, so that micro-steps have any weight, including zero."""
  draw = np.random.default_rng(seed)
  tokens = draw.integers(0, TINY.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
  mask = (draw.random((ROWS, LENGTH)) < np.array(keep)[:, None]).astype(np.float32)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), mask.shape)
  rows = Batch(tokens[:, :-1], tokens[:, 1:], mask, np.ones_like(positions), positions)
  order = draw.permutation(ROWS)
  whole, _ = ACCUMULATE(START, jax.tree.map(lambda x: x[None], rows))
  parts = jax.tree.map(lambda x: x[order].reshape(steps, ROWS // steps, LENGTH), rows)
  split, metrics = ACCUMULATE(START, parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), split.params, whole.params)
  assert float(metrics.sums.weight) == mask.sum()


MODEL, RULE = make_model(TINY), optax.sgd(lambda updates: 1.0)
ACCUMULATE = jax.jit(make_train_step(MODEL, RULE, lambda step: 1.0))
START = init_state(MODEL.init(jax.random.key(0)), RULE, jnp.zeros(2, jnp.uint32))
