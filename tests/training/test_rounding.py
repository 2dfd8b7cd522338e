"""bfloat16 parameters against numpy: stochastic rounding and the master copy, to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ll3m.training import optimizer
from ll3m.training.optimizer import AdamWConfig, LionConfig, OptimizerConfig
from ll3m.training.rounding import MasterState, cast_stochastically, round_stochastically

KEY = jax.random.key(3)


def neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the bfloat16 values around each float32, in float64: towards zero and away from it."""
  low = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
  infinity = np.copysign(np.inf, x).astype(ml_dtypes.bfloat16)
  above = np.nextafter(low.astype(ml_dtypes.bfloat16), infinity)
  exact = low == x
  return low.astype(np.float64), np.where(exact, low, above.astype(np.float32)).astype(np.float64)


def test_values_round_to_a_neighbour_with_the_exact_mean():
  """The number of times a value is rounded up is binomial: within five deviations of its mean."""
  rng = np.random.default_rng(0)
  x = np.concatenate([
    rng.normal(size=300) * 10.0 ** rng.integers(-30, 30, 300),
    [1.0, -1.0, 0.0, -0.0, 1 + 2**-8, 1 + 2**-23, -(2 - 2**-23), 3e-39],
  ]).astype(np.float32)  # fmt: skip
  draws = 4096
  rounded = np.asarray(round_stochastically(jnp.tile(x, (draws, 1)), KEY)).astype(np.float64)
  low, high = neighbours(x)
  assert ((rounded == low) | (rounded == high)).all()
  with np.errstate(invalid="ignore", divide="ignore"):
    share = np.where(high == low, 0.0, (x - low) / (high - low))
  up = np.where(high == low, 0, (rounded == high).sum(axis=0))
  deviation = np.abs(up - draws * share)
  assert (deviation <= 5 * np.sqrt(draws * share * (1 - share)) + 1e-9).all()
  exact = share == 0
  assert exact.sum() == 4 and (rounded[:, exact] == x[exact].astype(np.float64)).all()
  assert (np.signbit(rounded[0]) == np.signbit(x)).all()


def test_rounding_of_every_lower_half_matches_numpy():
  """All 2^16 lower halves are added to the same random bits in numpy."""
  lower = np.arange(2**16, dtype=np.uint32)
  x = (np.uint32(0xC0490000) | lower).view(np.float32)  # -3.14...
  noise = np.asarray(jax.random.bits(KEY, x.shape, jnp.uint16)).astype(np.uint32)
  expected = ((x.view(np.uint32) + noise) >> 16).astype(np.uint16)
  rounded = np.asarray(jax.jit(round_stochastically)(x, KEY))
  np.testing.assert_array_equal(rounded.view(np.uint16), expected)


def test_non_finite_values_are_unchanged_and_overflow_is_infinite():
  biggest = np.finfo(np.float32).max
  x = jnp.array([np.inf, -np.inf, np.nan, biggest, -biggest], jnp.float32)
  x = x.at[2].set(jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32))
  for seed in range(20):
    rounded = np.asarray(round_stochastically(x, jax.random.key(seed))).astype(np.float32)
    assert rounded[0] == np.inf and rounded[1] == -np.inf and np.isnan(rounded[2])
    assert rounded[3] >= 3.38e38 and rounded[4] <= -3.38e38


def test_random_bits_differ_by_array_and_do_not_depend_on_sharding():
  x = {"a": jnp.full((64, 32), 1 + 2**-8), "b": jnp.full((64, 32), 1 + 2**-8), "c": jnp.ones(8)}
  like = {"a": jnp.bfloat16(0), "b": jnp.bfloat16(0), "c": jnp.float32(0)}
  cast = jax.jit(lambda tree, key: cast_stochastically(tree, like, key))
  here = cast(x, KEY)
  assert here["c"].dtype == jnp.float32 and here["a"].dtype == jnp.bfloat16
  assert (here["a"] != here["b"]).any() and (cast(x, jax.random.key(4))["a"] != here["a"]).any()
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
  for spec in (("x", "y"), ("y", None), (None, "x")):
    there = dict(x, a=jax.device_put(x["a"], NamedSharding(mesh, PartitionSpec(*spec))))
    np.testing.assert_array_equal(cast(there, KEY)["a"], here["a"])


def rule(kind: str, update: str, **options):
  groups = {"adamw": AdamWConfig, "lion": LionConfig}
  chosen = groups[kind](lr=1e-5, end_lr=1e-5, **options)
  config = OptimizerConfig(type=kind, bf16_update=update, **{f"{kind}_optimizer": chosen})
  return optimizer.make_optimizer(config, total_steps=100)


def gradients(number):
  noise = jax.random.normal(jax.random.fold_in(KEY, number), (40, 50)) + 0.5
  return {"layer": {"w": noise.astype(jnp.bfloat16)}}


def after(step, params, state):
  """Returns parameters and state after 60 steps."""
  step = jax.jit(step)
  for number in range(60):
    params, state = step(params, state, number)
  return params["layer"]["w"], state


def trajectory(kind, update, params):
  """Returns the result of `apply` with parameters stored in bfloat16."""
  made = rule(kind, update)

  def step(params, state, number):
    key = jax.random.fold_in(KEY, number) if update == "stochastic" else None
    return optimizer.apply(made, gradients(number), state, params, key)

  return after(step, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), made.init(params))


def float32_trajectory(kind, params):
  """Returns the same in float32, with optax used as documented."""
  made = rule(kind, "nearest")

  def step(params, state, number):
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), gradients(number))
    updates, state = made.update(wide, state, params)
    return optax.apply_updates(params, updates), state

  return after(step, params, made.init(params))


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_updates_below_half_a_unit_are_lost_or_kept(kind):
  """Parameters near 1 have a unit in the last place of 8e-3; the 60 updates are about 1e-5."""
  start = np.float32(1 + np.random.default_rng(0).uniform(0, 0.5, (40, 50)))
  start = start.astype(ml_dtypes.bfloat16).astype(np.float32)
  params = {"layer": {"w": jnp.array(start)}}
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  exact, exact_state = float32_trajectory(kind, params)
  moved = np.asarray(exact) - start
  assert 1e-4 < np.abs(moved).mean() < 1e-2

  nearest, _ = trajectory(kind, "nearest", narrow)
  np.testing.assert_array_equal(np.asarray(nearest).astype(np.float32), start)

  copy, state = trajectory(kind, "master", params)
  assert isinstance(state, MasterState)
  np.testing.assert_array_equal(state.master["layer"]["w"], exact)  # to the bit
  expected = np.asarray(exact).astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(np.asarray(copy), expected)
  jax.tree.map(np.testing.assert_array_equal, state.inner, exact_state)

  rounded, _ = trajectory(kind, "stochastic", narrow)
  drift = np.asarray(rounded).astype(np.float64) - start
  # Each of 60 draws per parameter is off by at most one unit, 2^-7, with a probability that is the
  # update's share of the unit.
  assert abs(drift.mean() - moved.mean()) < 0.15 * abs(moved.mean())
