"""Steps, losses and batches of the Python API, compared with torch's gradients and plain optax."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ll3m
from ll3m import families
from ll3m.data.config import DatasetConfig, JsonDatasetConfig, SeqioDatasetConfig
from ll3m.families import tensor_rules
from tests.data.opening import open_dataset

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


@pytest.fixture(scope="module")
def model():
  return ll3m.load(PARITY / "llama2")


@pytest.fixture(scope="module")
def expected():
  return np.load(PARITY / "llama2" / "expected.npz")


def batch_of(tokens, mask=None) -> ll3m.Batch:
  """Returns a batch of rows with one document each.

  By default the loss is the mean over all tokens but the last, as in `expected.npz`.
  """
  tokens = np.asarray(tokens, np.int32)
  targets = np.concatenate([tokens[:, 1:], np.zeros_like(tokens[:, :1])], axis=1)
  if mask is None:
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
  ones = np.ones_like(tokens)
  return ll3m.Batch(tokens, targets, mask, ones, np.cumsum(ones, axis=1) - 1)


def test_an_sgd_step_matches_the_gradient_of_torch(model, expected):
  optimizer = optax.sgd(1.0)
  step = jax.jit(ll3m.make_train_step(model, optimizer))
  state, metrics = step(ll3m.init_state(model.params, optimizer), batch_of(expected["tokens"]))
  assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
  moved = jax.tree.map(np.subtract, model.params, state.params)
  norms = dict(zip(expected["gradient_names"], expected["gradient_norms"], strict=True))
  specs = tensor_rules.expected_tensors(families.FAMILIES["llama"].rules, model.config)
  for name, spec in specs.items():
    module, _, leaf = spec.ours.rpartition("/")
    value = moved[module][leaf] if spec.layer is None else moved[module][leaf][spec.layer]
    # Parameters are close to 1, so their difference has an error of about 1e-7.
    assert np.linalg.norm(value) == pytest.approx(norms[name], rel=1e-3, abs=1e-5)
  assert float(metrics["grad_norm"]) == pytest.approx(
    np.linalg.norm(list(norms.values())), rel=1e-5
  )


@pytest.mark.parametrize(
  "optimizer",
  [optax.adamw(1e-3), optax.lion(1e-4), optax.chain(optax.clip(1.0), optax.sgd(1e-2, momentum=0.9)),
   optax.adamw(optax.linear_schedule(1e-3, 0.0, 10))],
)  # fmt: skip
def test_updates_match_those_of_any_optax_optimizer(model, expected, optimizer):
  batch = jax.tree.map(jnp.asarray, batch_of(expected["tokens"]))

  @jax.jit
  @jax.grad
  def gradient_of(params):
    logits = model.decoder.logits(params, model.decoder.hidden(params, batch.inputs))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(losses * batch.mask) / jnp.sum(batch.mask)

  @jax.jit
  def update(gradients, opt_state, params):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  step = jax.jit(ll3m.make_train_step(model, optimizer))
  state = ll3m.init_state(model.params, optimizer)
  params, opt_state = model.params, optimizer.init(model.params)
  for number in range(1, 4):
    state, metrics = step(state, batch)
    params, opt_state = update(gradient_of(params), opt_state, params)
    assert int(state.step) == number and float(metrics["skipped"]) == 0
  for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
    # Adam and Lion normalise gradients: where a gradient is almost zero, its sign is random.
    close = np.isclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert close.mean() > 0.995


def test_a_custom_loss_is_the_quotient_over_all_micro_batches(model, expected):
  tokens = np.concatenate([expected["tokens"]] * 2)
  mask = np.ones(tokens.shape, np.float32)
  mask[:, -1], mask[0, 3:] = 0, 0  # micro-batches of different weights

  def loss_fn(model, params, batch):
    hidden = model.decoder.hidden(params, batch.inputs, batch.positions, batch.segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      model.decoder.logits(params, hidden), batch.targets
    )
    return jnp.sum(losses * batch.mask), jnp.sum(batch.mask)

  optimizer = optax.sgd(0.1)
  whole = batch_of(tokens, mask)
  parts = jax.tree.map(lambda x: x.reshape(2, -1, x.shape[1]), whole)
  found = []
  for batch, options in (
    (whole, {}),
    (whole, {"loss_fn": loss_fn}),
    (parts, {"loss_fn": loss_fn, "accumulate": 2}),
    (parts, {"accumulate": 2}),
  ):
    step = jax.jit(ll3m.make_train_step(model, optimizer, **options))
    state, metrics = step(ll3m.init_state(model.params, optimizer), batch)
    assert float(metrics["targets"]) == mask.sum()
    assert ("accuracy" in metrics) == ("loss_fn" not in options)
    found.append((float(metrics["loss"]), state.params))
  for loss, params in found[1:]:
    assert loss == pytest.approx(found[0][0], rel=1e-5)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(found[0][1]), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_nonfinite_step_changes_nothing(model, expected):
  optimizer = optax.adam(1e-3)
  step = ll3m.make_train_step(
    model, optimizer, loss_fn=lambda m, p, b: (jnp.nan * jnp.sum(p["embed"]["embedding"]), 1.0)
  )
  before = ll3m.init_state(model.params, optimizer)
  after, metrics = jax.jit(step)(before, batch_of(expected["tokens"]))
  assert float(metrics["skipped"]) == 1
  same = jax.tree.map(
    np.array_equal, (before.params, before.opt_state), (after.params, after.opt_state)
  )
  assert jax.tree.all(same)


def test_the_learning_rate_of_a_schedule_is_reported(model, expected):
  schedule = optax.linear_schedule(1.0, 0.0, 4)
  optimizer = optax.sgd(schedule)
  step = jax.jit(ll3m.make_train_step(model, optimizer, schedule=schedule))
  state, batch = ll3m.init_state(model.params, optimizer), batch_of(expected["tokens"])
  rates = []
  for _ in range(3):
    state, metrics = step(state, batch)
    rates.append(float(metrics["learning_rate"]))
  assert rates == [1.0, 0.75, 0.5]


def test_donating_the_state_keeps_the_model(model, expected):
  optimizer = optax.sgd(0.1)
  step = jax.jit(ll3m.make_train_step(model, optimizer), donate_argnums=0)
  step(ll3m.init_state(model.params, optimizer), batch_of(expected["tokens"]))
  assert np.isfinite(np.asarray(model.params["embed"]["embedding"])).all()


@pytest.mark.parametrize(
  ("accumulate", "shape", "message"),
  [(0, (2, 3), "at least 1"), (1, (1, 2, 3), r"must be \[B, T\]"), (2, (2, 3), r"\[2, B, T\]"),
   (2, (3, 2, 3), r"\[2, B, T\], got \(3, 2, 3\)")],
)  # fmt: skip
def test_batches_of_another_shape_are_rejected(model, accumulate, shape, message):
  optimizer = optax.sgd(0.1)
  batch = ll3m.Batch(*(np.zeros(shape, np.int32) for _ in ll3m.Batch._fields))
  with pytest.raises(ValueError, match=message):
    step = ll3m.make_train_step(model, optimizer, accumulate=accumulate)
    step(ll3m.init_state(model.params, optimizer), batch)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
  path.write_text(
    "".join(json.dumps({"text": f"row {i} " * (i % 5 + 1)}) + "\n" for i in range(40))
  )
  return path


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
  from ll3m.data.config import TokenizerConfig
  from ll3m.data.tokenizer import load_tokenizer

  return load_tokenizer(TokenizerConfig(path=str(byte_tokenizer)))


def test_batches_equal_those_of_the_commands(rows, tokenizer):
  ours = ll3m.data.jsonl(rows, tokenizer, batch_size=3, length=24, seed=5)
  config = DatasetConfig(
    type="json",
    json_dataset=JsonDatasetConfig(str(rows)),
    seqio_dataset=SeqioDatasetConfig(batch_size=3, task_feature_lengths=(24,), shuffle=True),
  )
  theirs = open_dataset(config, tokenizer, rows=range(3), seed=5)
  for _ in range(4):
    for one, other in zip(next(ours), next(theirs), strict=True):
      assert np.array_equal(one, other)


def test_evaluate_returns_the_mean_over_all_targets(rows, tokenizer):
  wide = ll3m.init("llama2_7b", num_layers=1, d_model=16, d_ff=8, num_heads=2,
                   num_kv_heads=2, head_dim=8, vocab_size=258)  # fmt: skip

  def batches(**options):
    return ll3m.data.jsonl(
      rows, tokenizer, batch_size=2, length=32, shuffle=False, repeat=False, **options
    )

  record = ll3m.evaluate(wide, batches())
  losses = targets = 0.0
  for batch in batches():
    logits = np.asarray(wide.logits(batch.inputs, batch.segment_ids), np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0]
    losses, targets = losses - (picked * batch.mask).sum(), targets + batch.mask.sum()
  assert record["targets"] == targets
  assert record["loss"] == pytest.approx(losses / targets, rel=1e-4)
  assert ll3m.evaluate(wide, batches(), steps=1)["targets"] < targets
  with pytest.raises(ValueError, match="target tokens"):
    ll3m.evaluate(wide, [])
