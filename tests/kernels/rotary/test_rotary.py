"""Rotary embeddings against float64 NumPy, in both implementations.

Dimensions: B batch, T tokens, N query heads, K KV heads, H head dim, R rotated dims.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import shapes
from ll3m_kernels.rotary import kernel
from ll3m_kernels.rotary.angles import Rotation
from tests.kernels.rotary.oracle import (
  IMPLEMENTATIONS,
  LAST,
  check,
  draw,
  oracle,
  rotate_and_back,
)
from tests.kernels.tolerances import assert_close


@pytest.mark.parametrize(
  ("batch", "length", "heads", "size", "rotary_dim"),
  [
    (2, 21, (3, 1), 8, None),
    (2, 130, (2, 2), 16, 6),  # more than 128 tokens, not a multiple of 128
    (1, 1, (4, 2), 64, None),  # decoding
    (1, 24, (2, 1), 96, None),
    (1, 24, (1, 2), 100, None),  # halves that are not a multiple of 8 rows
  ],
)
def test_values_and_gradients(batch, length, heads, size, rotary_dim):
  arrays, positions = draw(batch, length, heads, size)
  check(arrays, positions, rotary_dim=rotary_dim)


@pytest.mark.parametrize("factor", [1.5, 4.0, 1e6])
def test_positions_divided_by_a_factor(factor):
  arrays, positions = draw(2, 21, (2, 1), 16, most=LAST)
  check(arrays, positions, rotary_dim=12, scaling_factor=factor)


@pytest.mark.parametrize("magnitude", [1.0, 1.19])
def test_frequencies_of_single_pairs(magnitude):
  arrays, positions = draw(2, 140, (2, 1), 16, most=LAST)
  frequencies = tuple((np.random.default_rng(1).uniform(-2, 2, 6) ** 7).tolist())
  check(arrays, positions, rotary_dim=12, inverse_frequencies=frequencies, magnitude=magnitude)


@pytest.mark.parametrize("model", shapes.ROTARY)
def test_shapes_of_real_models(model):
  shape = shapes.ROTARY[model]
  heads = shape.num_heads, shape.num_kv_heads
  arrays, positions = draw(1, 20, heads, shape.head_dim, jnp.bfloat16)
  check(arrays, positions, rotary_dim=shape.rotary_dim)


def test_no_races():
  arrays, positions = draw(2, 300, (3, 2), 16)
  check(arrays, positions, ["pallas"], rotary_dim=12, races=True)


@pytest.mark.parametrize(
  ("heads_of_a_block", "fetched", "steps"),
  [
    (7, 64, 1),
    (4, 2, 2),  # a partial block of heads; positions in two fetches, the last one partial
    (3, 1, 3),  # more steps than blocks of keys
    (0, 64, 5),  # even one head each exceeds the limit
  ],
)
def test_blocks(retraced, monkeypatch, heads_of_a_block, fetched, steps):
  """Blocks have 128 tokens; the last one is partial."""
  monkeypatch.setattr(kernel, "_BLOCK_BYTES", heads_of_a_block * 32 * 128 * 4)
  monkeypatch.setattr(kernel, "_TOKENS", 128)
  monkeypatch.setattr(kernel, "_BLOCKS_OF_POSITIONS", fetched)
  arrays, positions = draw(1, 300, (5, 2), 32)
  blocks, _ = kernel.blocks_of(Rotation(1e4, 32), *arrays[:2])
  assert (blocks.tokens, blocks.steps) == (128, steps)
  check(arrays, positions, ["pallas"])


def test_blocks_of_real_models():
  def blocks(dtype, num_heads, num_kv_heads, size, length=4096):
    query, key = (
      jax.ShapeDtypeStruct((1, length, n, size), dtype) for n in (num_heads, num_kv_heads)
    )
    found, needed = kernel.blocks_of(Rotation(1e4, size), query, key)
    assert needed <= 14 * 2**20  # of the 16 MiB of a v4
    return tuple(found)

  assert blocks(jnp.bfloat16, 32, 8, 128) == (512, 16, 4, 2)
  assert blocks(jnp.bfloat16, 8, 1, 256) == (512, 8, 1, 1)
  assert blocks(jnp.bfloat16, 9, 3, 64) == (1024, 9, 3, 1)
  assert blocks(jnp.bfloat16, 9, 3, 64, length=100) == (100, 9, 3, 1)
  assert blocks(jnp.bfloat16, 9, 3, 64, length=1100) == (640, 9, 3, 1)
  assert blocks(jnp.float32, 64, 1, 512) == (512, 1, 1, 64)


@settings(max_examples=4, deadline=None)
@given(
  batch=st.integers(1, 3),
  length=st.integers(1, 140),
  heads=st.tuples(st.integers(1, 4), st.integers(1, 3)),
  half=st.integers(1, 12),
  untouched=st.integers(0, 9),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_any_shape(batch, length, heads, half, untouched, dtype):
  arrays, positions = draw(batch, length, heads, 2 * half + untouched, dtype)
  check(arrays, positions, rotary_dim=2 * half)


@pytest.mark.parametrize("theta", [1e4, 1e5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cos_and_sin_are_accurate_at_any_position(implementation, theta):
  """Rotates ones in the first half of a head, which gives (cos, sin).

  Errors of 2e-5 up to position 4,096 and 2e-3 up to a million would suffice (bfloat16's half ulp);
  the documented bound is 1e-6.
  """
  size = 128
  rng = np.random.default_rng(0)
  positions = np.concatenate(
    [
      rng.integers(0, 4097, 100),
      rng.integers(0, LAST + 1, 120),
      np.arange(18),
      LAST - np.arange(18),
    ]
  ).reshape(2, 128)
  unit = jnp.ones((2, 128, 1, size)).at[..., size // 2 :].set(0.0)
  turned, *_ = rotate_and_back(implementation, [unit] * 4, jnp.asarray(positions), theta=theta)
  assert turned.dtype == jnp.float32
  error = np.abs(np.asarray(turned, np.float64) - oracle(unit, positions, theta)).max()
  assert 0 < error <= 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_position_0_and_unrotated_dimensions_are_unchanged(implementation):
  (query, key, *cotangents), positions = draw(1, 20, (2, 1), 16, jnp.bfloat16)
  positions = positions.at[:, ::2].set(0)
  turned, _, back, _ = rotate_and_back(
    implementation, [query, key, *cotangents], positions, rotary_dim=10
  )
  for ours, given_ in ((turned, query), (back, cotangents[0])):
    np.testing.assert_array_equal(ours[:, ::2], given_[:, ::2])
    np.testing.assert_array_equal(ours[..., 10:], given_[..., 10:])
  assert not np.array_equal(turned[..., :10], query[..., :10])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_array_keeps_its_own_dtype(implementation):
  (query, key, *bars), positions = draw(1, 20, (2, 1), 16)
  key, bars[1] = key.astype(jnp.bfloat16), bars[1].astype(jnp.bfloat16)
  results = rotate_and_back(implementation, [query, key, *bars], positions)
  assert [x.dtype for x in results] == [jnp.float32, jnp.bfloat16] * 2
  assert_close(results[0], oracle(query, positions), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int16])
def test_positions_of_any_integer_type(dtype):
  arrays, positions = draw(2, 9, (2, 1), 8, most=120)
  expected = rotate_and_back("xla", arrays, positions)
  for ours, theirs in zip(
    rotate_and_back("xla", arrays, positions.astype(dtype)), expected, strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_positions(implementation):
  arrays, positions = draw(1, 40, (1, 1), 64, most=2**20)
  positions = -positions
  turned, *_ = rotate_and_back(implementation, arrays, positions)
  assert np.abs(np.asarray(turned, np.float64) - oracle(arrays[0], positions)).max() <= 5e-6
