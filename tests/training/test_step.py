"""The training step against gradients and sums computed with jax.nn from whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ll3m import families
from ll3m.core import sharding
from ll3m.data.batch import Batch
from ll3m.models.transformer import make_model
from ll3m.training import sharded_batches
from ll3m.training.step import init_state, make_eval_step, make_train_step

CONFIG = families.get_preset("llama2_7b").config.replace(
  vocab_size=53, d_model=24, d_ff=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
  max_positions=32,
)  # fmt: skip
LENGTH = 11


def make_batch(seed: int, rows: int, keep: float = 0.7) -> Batch:
  """Returns rows of two documents each, with a random loss mask."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, CONFIG.vocab_size, (rows, LENGTH + 1), dtype=np.int32)
  cut = 4
  segments = np.where(np.arange(LENGTH) < cut, 1, 2).astype(np.int32)
  positions = np.where(np.arange(LENGTH) < cut, np.arange(LENGTH), np.arange(LENGTH) - cut)
  return Batch(
    inputs=tokens[:, :-1],
    targets=tokens[:, 1:],
    mask=(rng.random((rows, LENGTH)) < keep).astype(np.float32),
    segment_ids=np.broadcast_to(segments, (rows, LENGTH)).copy(),
    positions=np.broadcast_to(positions, (rows, LENGTH)).astype(np.int32),
  )


def direct_loss(model, params, batch, z_loss=0.0):
  """Returns the mean loss over all target tokens, computed with jax.nn from whole logits."""
  batch = jax.tree.map(jnp.asarray, batch)
  logits = model.logits(
    params, model.hidden(params, batch.inputs, batch.positions, batch.segment_ids)
  )
  nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
  penalty = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
  return jnp.sum((nll + penalty) * batch.mask) / jnp.sum(batch.mask)


@pytest.fixture(scope="module")
def model():
  return make_model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
  return model.init(jax.random.key(1))


def one_step(model, params, batch, rule, **options):
  step = jax.jit(make_train_step(model, rule, lambda step: 0.5, **options))
  return step(init_state(params, rule, jnp.zeros(2, jnp.uint32)), batch)


def stack(*batches):
  return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def test_step_is_gradient_descent_on_the_mean_loss(model, params):
  batch = make_batch(0, 3)
  state, metrics = one_step(
    model, params, stack(batch), optax.sgd(lambda updates: 1.0), z_loss=1e-2
  )
  loss, gradients = jax.value_and_grad(lambda p: direct_loss(model, p, batch, 1e-2))(params)
  expected = jax.tree.map(lambda p, g: p - g, params, gradients)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, expected)
  assert int(state.step) == 1
  total = (metrics.sums.loss + metrics.sums.z_loss) / metrics.sums.weight
  assert float(total) == pytest.approx(float(loss), rel=1e-5)
  assert float(metrics.gradient_norm) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
  assert float(metrics.parameter_norm) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)
  assert float(metrics.learning_rate) == 0.5
  assert float(metrics.sums.tokens) == 3 * LENGTH


def test_ragged_accumulation_equals_one_large_batch(model, params):
  """With few targets in one micro-step and many in the other, the mean of means would differ."""
  few, many = make_batch(1, 2, keep=0.2), make_batch(2, 2, keep=0.95)
  assert few.mask.sum() * 4 < many.mask.sum()
  big = jax.tree.map(lambda a, b: np.concatenate([a, b]), few, many)
  rule = optax.sgd(lambda updates: 1.0)
  accumulated, metrics = one_step(model, params, stack(few, many), rule)
  whole, _ = one_step(model, params, stack(big), rule)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), accumulated.params, whole.params
  )
  gradients = jax.grad(lambda p: direct_loss(model, p, big))(params)
  expected = jax.tree.map(lambda p, g: p - g, params, gradients)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), accumulated.params, expected
  )
  means = [jax.grad(lambda p, b=b: direct_loss(model, p, b))(params) for b in (few, many)]
  wrong = jax.tree.map(lambda p, a, b: p - (a + b) / 2, params, *means)
  assert optax.tree.norm(jax.tree.map(lambda a, b: a - b, wrong, expected)) > 1e-2
  assert float(metrics.sums.weight) == big.mask.sum()


def test_a_batch_without_targets_changes_nothing(model, params):
  batch = make_batch(3, 2)._replace(mask=np.zeros((2, LENGTH), np.float32))
  state, metrics = one_step(model, params, stack(batch), optax.sgd(lambda updates: 1.0))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), state.params, params)
  assert float(metrics.sums.loss) == 0.0
  assert float(metrics.gradient_norm) == 0.0


def test_accuracy_counts_the_largest_logit(model, params):
  batch = jax.tree.map(jnp.asarray, make_batch(4, 3))
  logits = model.logits(
    params, model.hidden(params, batch.inputs, batch.positions, batch.segment_ids)
  )
  best = np.asarray(jnp.argmax(logits, -1))
  even = (np.arange(LENGTH) % 2 == 0)[None]
  half = np.where(even, best, batch.targets).astype(np.int32)  # about half are correct
  batch = batch._replace(targets=jnp.asarray(half))
  sums = jax.jit(make_eval_step(model))(params, batch)
  assert float(sums.correct) == ((best == half) * np.asarray(batch.mask)).sum()
  assert 0 < float(sums.correct) < float(sums.weight)
  expected = float(direct_loss(model, params, batch)) * float(batch.mask.sum())
  assert float(sums.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mesh_dim", ["8,1,1", "2,2,2", "1,4,2"])
def test_a_sharded_step_equals_the_unsharded_one(model, params, mesh_dim):
  mesh = sharding.make_mesh(mesh_dim)
  batch = stack(make_batch(5, 8), make_batch(6, 8))
  rule = optax.sgd(lambda updates: 1.0)
  alone, alone_metrics = one_step(model, params, batch, rule)
  placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
  state, metrics = one_step(model, placed, sharded_batches.to_devices(batch, mesh), rule)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state.params, alone.params)
  assert float(metrics.sums.loss) == pytest.approx(float(alone_metrics.sums.loss), rel=1e-6)


def test_micro_steps_are_stacked_in_order():
  batches = [make_batch(seed, 2) for seed in range(3)]
  stacked = sharded_batches.stack_micro_steps(iter(batches), 2)
  np.testing.assert_array_equal(stacked.inputs, np.stack([batches[0].inputs, batches[1].inputs]))
  assert stacked.mask.shape == (2, 2, LENGTH)
