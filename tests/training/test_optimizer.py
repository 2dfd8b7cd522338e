"""Schedule, decay mask and update rules against closed forms and optax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ll3m.core import sharding
from ll3m.training import optimizer
from ll3m.training.optimizer import (
  AdafactorConfig,
  AdamWConfig,
  LionConfig,
  OptimizerConfig,
  SgdConfig,
)


def test_schedule_warms_up_and_follows_a_cosine():
  config = AdamWConfig(lr=1.0, init_lr=0.0, end_lr=0.1, lr_warmup_steps=4, lr_decay_steps=14)
  schedule = optimizer.make_schedule(config, total_steps=100)
  # The first update is one step into the warm-up, not at learning rate 0.
  warm_up = [float(schedule(step)) for step in range(4)]
  np.testing.assert_allclose(warm_up, [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  middle = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 5 / 10))
  assert float(schedule(8)) == pytest.approx(middle, rel=1e-6)
  for step in (13, 14, 99):
    assert float(schedule(step)) == pytest.approx(0.1, rel=1e-6)


def test_cosine_decay_ends_with_the_run_by_default():
  config = AdamWConfig(lr=1.0, end_lr=0.25)
  schedule = optimizer.make_schedule(config, total_steps=20)
  assert float(schedule(19)) == pytest.approx(0.25, rel=1e-6)
  assert float(schedule(9)) == pytest.approx(0.625, rel=1e-6)  # half-way


def test_the_final_learning_rate_is_a_tenth_of_the_peak_by_default():
  schedule = optimizer.make_schedule(AdamWConfig(lr=3e-6), total_steps=20)
  assert float(schedule(19)) == pytest.approx(3e-7, rel=1e-5)
  with pytest.raises(ValueError, match=r"`end_lr` \(0.1\) .*`lr` \(0.01\)"):
    AdamWConfig(lr=0.01, end_lr=0.1)


def test_weight_decay_skips_norms_biases_and_embeddings():
  params = {
    "embed": {"embedding": 0},
    "layers/attention/query": {"w": 0, "b": 0},
    "layers/mlp_norm": {"scale": 0, "bias": 0},
    "final_norm": {"scale": 0},
    "head": {"w": 0},
  }
  assert optimizer.decay_mask(params) == {
    "embed": {"embedding": False},
    "layers/attention/query": {"w": True, "b": False},
    "layers/mlp_norm": {"scale": False, "bias": False},
    "final_norm": {"scale": False},
    "head": {"w": True},
  }


def numpy_adamw(config, params, gradients, steps, decayed):
  """Returns parameters after steps of AdamW with clipping, by the paper's equations in float64."""
  p = {k: v.astype(np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in p.items()}
  v = {k: np.zeros_like(w) for k, w in p.items()}
  for t in range(1, steps + 1):
    g = {k: w.astype(np.float64) for k, w in gradients.items()}
    norm = np.sqrt(sum((w**2).sum() for w in g.values()))
    for k in p:
      gk = g[k] * min(1.0, config.clip_gradient / norm)
      m[k] = config.b1 * m[k] + (1 - config.b1) * gk
      v[k] = config.b2 * v[k] + (1 - config.b2) * gk**2
      update = (m[k] / (1 - config.b1**t)) / (np.sqrt(v[k] / (1 - config.b2**t)) + config.eps)
      if k in decayed:
        update = update + config.weight_decay * p[k]
      p[k] = p[k] - config.lr * update
  return p


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_adamw_matches_its_paper(clip):
  rng = np.random.default_rng(0)
  params = {"w": rng.normal(size=(3, 5)), "b": rng.normal(size=(5,))}
  gradients = {"w": rng.normal(size=(3, 5)), "b": rng.normal(size=(5,))}
  chosen = AdamWConfig(lr=0.01, end_lr=0.01, weight_decay=0.1, clip_gradient=clip)
  rule = optimizer.make_optimizer(OptimizerConfig(adamw_optimizer=chosen), total_steps=10)
  ours = {"layer": jax.tree.map(jnp.float32, params)}
  state = rule.init(ours)
  for _ in range(4):
    ours, state = optimizer.apply(
      rule, {"layer": jax.tree.map(jnp.float32, gradients)}, state, ours
    )
  expected = numpy_adamw(chosen, params, gradients, 4, decayed={"w"})
  for name in params:
    np.testing.assert_allclose(ours["layer"][name], expected[name], rtol=2e-5)


def test_lion_matches_its_paper():
  """The reference is Chen et al., 2023, algorithm 2, in float64."""
  rng = np.random.default_rng(0)
  p, m = rng.normal(size=(3, 5)), np.zeros((3, 5))
  chosen = LionConfig(lr=0.01, end_lr=0.01, weight_decay=0.3, clip_gradient=0.0)
  config = OptimizerConfig(type="lion", lion_optimizer=chosen)
  rule = optimizer.make_optimizer(config, total_steps=10)
  ours = {"layer": {"w": jnp.float32(p)}}
  state = rule.init(ours)
  for _ in range(5):
    g = rng.normal(size=(3, 5)).astype(np.float32).astype(np.float64)
    ours, state = optimizer.apply(rule, {"layer": {"w": jnp.float32(g)}}, state, ours)
    update = np.sign(chosen.b1 * m + (1 - chosen.b1) * g)
    p = p - chosen.lr * (update + chosen.weight_decay * p)
    m = chosen.b2 * m + (1 - chosen.b2) * g
  np.testing.assert_allclose(ours["layer"]["w"], p, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(160, 130), (3, 130)])  # factored, and more layers than rows
def test_adafactor_updates_stacked_layers_separately(scaled, shape):
  """Four layers with gradients and parameters of very different sizes match optax per layer."""
  rng = np.random.default_rng(0)
  sizes = np.array([0.01, 0.1, 1.0, 10.0]).reshape(4, 1, 1)
  stacked = jnp.float32(rng.normal(size=(4, *shape)) * sizes)
  config = AdafactorConfig(
    lr=0.1, end_lr=0.1, clip_gradient=0.0, multiply_by_parameter_scale=scaled, bf16_momentum=True
  )
  config = OptimizerConfig(type="adafactor", adafactor_optimizer=config)
  rule = optimizer.make_optimizer(config, total_steps=10)
  ours = {"layers/mlp": {"w": stacked}, "head": {"w": stacked[2]}}
  state = rule.init(ours)
  parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
  parts += [optax.scale_by_param_block_rms()] if scaled else []
  parts += [optax.ema(0.9, debias=False), optax.scale(-0.1)]
  alone = optax.chain(*parts)
  layers = list(stacked)
  states = [alone.init(layer) for layer in layers]
  for _ in range(3):
    gradients = jnp.float32(rng.normal(size=(4, *shape)) * sizes[::-1] ** 2)
    ours, state = optimizer.apply(
      rule, {"layers/mlp": {"w": gradients}, "head": {"w": gradients[2]}}, state, ours
    )
    # Stores the momentum in bfloat16, as the tested rule does.
    for i, layer in enumerate(layers):
      updates, states[i] = alone.update(gradients[i], states[i], layer)
      layers[i] = optax.apply_updates(layer, updates)
      ema = states[i][-2]
      rounded = ema.ema.astype(jnp.bfloat16).astype(jnp.float32)
      states[i] = (*states[i][:-2], ema._replace(ema=rounded), states[i][-1])
  np.testing.assert_allclose(ours["layers/mlp"]["w"], jnp.stack(layers), rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(ours["head"]["w"], layers[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimizer_descends_and_keeps_its_dtypes(kind):
  groups = {
    "adamw_optimizer": AdamWConfig(lr=0.05, bf16_momentum=True),
    "adafactor_optimizer": AdafactorConfig(lr=0.05, bf16_momentum=True),
    "lion_optimizer": LionConfig(lr=0.05, bf16_momentum=True),
    "sgd_optimizer": SgdConfig(lr=0.02, momentum=0.5, clip_gradient=0.0),
  }
  rule = optimizer.make_optimizer(OptimizerConfig(type=kind, **groups), total_steps=1000)
  params = {"layer": {"w": jnp.full((130, 131), 3.0, jnp.bfloat16)}}
  state = rule.init(params)

  @jax.jit
  def step(params, state):
    return optimizer.apply(rule, jax.tree.map(lambda p: 2 * p, params), state, params)

  dtypes = jax.tree.map(lambda x: x.dtype, (params, state))
  for _ in range(60):
    params, state = step(params, state)
  assert jax.tree.map(lambda x: x.dtype, (params, state)) == dtypes
  assert float(jnp.abs(params["layer"]["w"]).max()) < 2.0


def test_bfloat16_moments_do_not_stall():
  """An increment of 1/1000 of a second moment would vanish in bfloat16 arithmetic."""
  config = AdamWConfig(lr=0.0, b2=0.999, clip_gradient=0.0)
  rule = optimizer.make_optimizer(OptimizerConfig(adamw_optimizer=config), total_steps=10)
  params = {"layer": {"w": jnp.ones((4,), jnp.bfloat16)}}
  state = rule.init(params)
  nu = optax.tree_utils.tree_get(state, "nu")
  assert nu["layer"]["w"].dtype == jnp.bfloat16
  for _ in range(3):
    _, state = optimizer.apply(rule, params, state, params)
  nu = optax.tree_utils.tree_get(state, "nu")["layer"]["w"].astype(jnp.float32)
  np.testing.assert_allclose(nu, 1 - 0.999**3, rtol=2**-7)


def test_state_is_sharded_like_its_parameter():
  mesh = sharding.make_mesh("2,2,2")
  params = {
    "layers/attention/query": {"w": jax.ShapeDtypeStruct((2, 256, 256), jnp.float32)},
    "final_norm": {"scale": jax.ShapeDtypeStruct((256,), jnp.float32)},
  }
  shardings = sharding.parameter_shardings(params, mesh)
  for kind in ("adamw", "adafactor"):
    rule = optimizer.make_optimizer(OptimizerConfig(type=kind), total_steps=10)
    placed = optimizer.state_shardings(rule, params, shardings, sharding.replicated(mesh))
    state = jax.eval_shape(rule.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(placed)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
      place.shard_shape(leaf.shape)  # raises where it does not fit
    split = [
      p for p in jax.tree.leaves(placed) if p.spec == shardings["layers/attention/query"]["w"].spec
    ]
    assert len(split) == (2 if kind == "adamw" else 0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lr": -1.0}, "`lr` .*negative.* -1.0"),
    ({"lr": float("nan")}, "`lr` .*negative.* nan"),
    ({"lr_warmup_steps": 5, "lr_decay_steps": 5}, "larger than `lr_warmup_steps`"),
  ],
)
def test_bad_options_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    AdamWConfig(**changes)
  with pytest.raises(ValueError, match="`accumulate_gradient_steps` .*1, got 0"):
    OptimizerConfig(accumulate_gradient_steps=0)
