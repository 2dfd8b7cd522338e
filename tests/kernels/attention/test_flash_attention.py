"""Values and all gradients of both implementations of attention, against float64 NumPy."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import ll3m_kernels as kernels
from benchmarks import shapes
from ll3m_kernels import flash_attention
from tests.kernels import numpy_kernels
from tests.kernels.attention import oracle
from tests.kernels.attention.sizes import sizes
from tests.kernels.tolerances import assert_close

# Several block_q and block_kv even in short sequences.
SMALL = sizes(128, 128, 256, 128, 128, 256)
# Partial blocks of several tiles, processed in five steps.
STAIRS = sizes(640, 128, 1280, 256, 128, 512)
# Partial blocks of one tile; steps of several partial blocks together are as large.
TOGETHER = sizes(640, 640, 1280, 256, 128, 512)
ALL_TOGETHER = sizes(640, 640, 1920, 256, 128, 512)
# Steps of four bands; of two bands where both edges of a window are processed together.
BANDS = sizes(512, 256, 1536, 256, 128, 512)


def segments(batch, length, count, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(np.sort(rng.integers(0, count, (batch, length)), axis=1), jnp.int32)


# name: (B, T, S, N, K, H, Hv), options
CASES = {
  "one_block": ((2, 64, 64, 4, 2, 16, 16), {}),
  "tails": ((1, 300, 520, 2, 1, 32, 32), {"block_sizes": SMALL}),
  "causal": ((1, 390, 390, 2, 2, 32, 24), {"is_causal": True, "block_sizes": SMALL}),
  "causal_more_keys": ((1, 200, 520, 2, 1, 8, 8), {"is_causal": True, "block_sizes": SMALL}),
  "causal_more_queries": ((1, 520, 200, 2, 1, 8, 8), {"is_causal": True, "block_sizes": SMALL}),
  "window": ((1, 520, 300, 2, 1, 80, 80), {"local_window_size": (90, 30), "block_sizes": SMALL}),
  "window_number": ((1, 260, 260, 1, 1, 8, 8), {"local_window_size": 7, "block_sizes": SMALL}),
  "causal_window": (
    (1, 650, 650, 2, 1, 16, 16),
    {"is_causal": True, "local_window_size": (150, 9), "block_sizes": SMALL},
  ),
  "itself_only": ((1, 140, 140, 2, 1, 100, 100), {"is_causal": True, "local_window_size": (0, 0)}),
  # Blocks of the backward pass reach beyond these heads; dQ is passed on between several calls.
  "odd_heads": ((1, 300, 520, 2, 1, 100, 36), {"block_sizes": SMALL}),
  "nothing_seen": ((1, 400, 130, 2, 1, 16, 16), {"local_window_size": (20, 0)}),
  "segments": (
    (2, 390, 390, 2, 1, 24, 24),
    {"is_causal": True, "segment_ids": segments(2, 390, 5), "block_sizes": SMALL},
  ),
  "segments_of_both": (
    (2, 200, 390, 2, 1, 16, 8),
    {
      "segment_ids": (segments(2, 200, 7), segments(2, 390, 4, 1)),
      "logits_soft_cap": 2.0,
      "block_sizes": SMALL,
    },
  ),
  "unsorted_segments": (
    (1, 260, 260, 2, 1, 16, 16),
    {
      "segment_ids": jnp.asarray(np.random.default_rng(3).integers(-9, 9, (1, 260))),
      "block_sizes": SMALL,
    },
  ),
  "bands": (
    (1, 1100, 1100, 1, 1, 16, 16),
    {"is_causal": True, "segment_ids": segments(1, 1100, 3), "block_sizes": BANDS},
  ),
  # The second block of queries skips the partial block on the diagonal, by its segment ids.
  "bands_of_other_segments": (
    (1, 1100, 1100, 1, 1, 16, 16),
    {
      "is_causal": True,
      "segment_ids": (jnp.zeros((1, 1100), jnp.int32), jnp.arange(1100)[None] // 512),
      "block_sizes": BANDS,
    },
  ),
  "bands_of_a_window": (
    (1, 1100, 1100, 2, 1, 8, 8),
    {"is_causal": True, "local_window_size": (511, 0), "block_sizes": BANDS},
  ),
  "bands_to_both_sides": (
    (1, 1100, 1100, 1, 1, 8, 8),
    {"local_window_size": (70, 200), "block_sizes": BANDS},
  ),
  "stairs": ((1, 1400, 1400, 2, 1, 16, 16), {"is_causal": True, "block_sizes": STAIRS}),
  "stairs_of_a_window": (
    (1, 1400, 1400, 1, 1, 8, 8),
    {"is_causal": True, "local_window_size": (639, 0), "block_sizes": STAIRS},
  ),
  # The first of three blocks of queries has one partial block, the second has two in one block_kv,
  # and the third has two in different block_kv.
  "stairs_together": (
    (1, 1850, 1850, 2, 1, 8, 8),
    {"is_causal": True, "local_window_size": (639, 0), "block_sizes": TOGETHER},
  ),
  "three_stairs_together": (
    (1, 1850, 1850, 1, 1, 8, 8),
    {"is_causal": True, "local_window_size": (700, 0), "block_sizes": ALL_TOGETHER},
  ),
  "stairs_of_two_sides_together": (
    (1, 1300, 1920, 1, 1, 8, 8),
    {"local_window_size": (300, 400), "block_sizes": ALL_TOGETHER},
  ),
  "stairs_of_two_sides": (
    (1, 1300, 1700, 1, 1, 8, 8),
    {"local_window_size": (150, 777), "block_sizes": STAIRS},
  ),
  "stairs_beyond_the_last_key": (
    (1, 1700, 900, 1, 1, 8, 8),
    {"is_causal": True, "block_sizes": STAIRS},
  ),
  "stairs_of_segments": (
    (1, 1400, 1400, 1, 1, 8, 8),
    {"is_causal": True, "segment_ids": segments(1, 1400, 6), "block_sizes": STAIRS},
  ),
  "negative_scale": ((1, 140, 140, 1, 1, 16, 16), {"scale": -0.7, "is_causal": True}),
  "no_scale": ((1, 140, 140, 1, 1, 16, 16), {"scale": 0.0, "is_causal": True}),
  "tiny_scale": ((1, 140, 140, 1, 1, 16, 16), {"scale": 1e-9, "is_causal": True}),
  "soft_cap_and_scale": ((1, 200, 200, 2, 2, 64, 64), {"logits_soft_cap": 1.5, "scale": 0.5}),
  "one_query": (
    (2, 1, 300, 4, 2, 64, 64),
    {"segment_ids": (jnp.ones((2, 1), jnp.int32), segments(2, 300, 2)), "block_sizes": SMALL},
  ),
  "decoding": (
    (2, 1, 300, 4, 2, 64, 64),
    {"segment_ids": (jnp.ones((2, 1), jnp.int32), segments(2, 300, 2))},
  ),
  # Several blocks of keys and a tail; one query sees no key.
  "few_queries": (
    (2, 3, 5000, 4, 2, 64, 32),
    {
      "segment_ids": (jnp.asarray([[0, 1, 1], [7, 1, 0]]), segments(2, 5000, 3)),
      "logits_soft_cap": 2.0,
    },
  ),
  "one_query_of_each_head": ((1, 1, 9000, 2, 2, 8, 8), {"scale": 2.0}),
  "one_token": ((3, 1, 1, 2, 1, 8, 8), {"is_causal": True}),
}
INTERPRETERS = {
  "nan_memory": pltpu.InterpretParams(),
  "races_and_shuffled": pltpu.InterpretParams(detect_races=True, random_seed=7),
}


def draw(shape, dtype=jnp.float32, seed=0):
  batch, length, num_keys, num_heads, num_kv_heads, head_dim, value_dim = shape
  rng = np.random.default_rng(seed)
  sizes = (
    (batch, length, num_heads, head_dim),
    (batch, num_keys, num_kv_heads, head_dim),
    (batch, num_keys, num_kv_heads, value_dim),
    (batch, length, num_heads, value_dim),
  )
  arrays = [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]
  return (*arrays, jnp.asarray(rng.normal(size=(batch, num_heads, length)), jnp.float32))


def run(implementation, arrays, **options):
  """Returns output, log-sum-exp and the three gradients."""
  *inputs, output_bar, log_sum_exp_bar = arrays
  if implementation == "xla":
    options.pop("block_sizes", None)

  def both(query, key, value):
    results, vjp = jax.vjp(
      lambda *x: flash_attention(
        *x, return_residual=True, implementation=implementation, **options
      ),
      query,
      key,
      value,
    )
    return (*results, *vjp((output_bar, log_sum_exp_bar)))

  return jax.jit(both)(*inputs)


@functools.cache
def drawn(case, dtype=jnp.float32):
  """Returns the arrays and expected results of a case; cached for all its tests."""
  shape, options = CASES[case]
  arrays = draw(shape, dtype)
  return arrays, expect(arrays, options)


@functools.cache
def plain_bfloat16(case):
  """Returns the results of plain jnp in bfloat16, whose error bounds that of every generation."""
  return run("xla", drawn(case, jnp.bfloat16)[0], **CASES[case][1])


def expect(arrays, options):
  return oracle.attention(*arrays, **{k: v for k, v in options.items() if k != "block_sizes"})


def compare(actual, arrays, dtype, xla=None, **options):
  check(actual, expect(arrays, options), dtype, xla)


def check(actual, expected, dtype, xla=None):
  for i, name in enumerate(oracle.Attended._fields):
    assert_close(actual[i], expected[i], dtype, None if xla is None else xla[i], name)
  sees_nothing = expected.log_sum_exp == oracle.UNSEEN
  assert (np.asarray(actual[0]).swapaxes(1, 2)[sees_nothing] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_xla_matches_the_oracle(case):
  options = CASES[case][1]
  arrays, expected = drawn(case)
  check(run("xla", arrays, **options), expected, jnp.float32)


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_the_oracle(case):
  options = CASES[case][1]
  arrays, expected = drawn(case)
  with numpy_kernels.interpreted():
    check(run("pallas", arrays, **options), expected, jnp.float32)


@pytest.mark.parametrize(
  "case",
  [
    "tails", "causal_window", "odd_heads", "segments_of_both", "bands", "bands_to_both_sides",
    "stairs_together", "three_stairs_together", "stairs_beyond_the_last_key", "negative_scale",
  ],
)  # fmt: skip
def test_kernel_with_acc_not_transposed(case):
  """This is so on v6e, and elsewhere for head dims of 128 or more."""
  options = CASES[case][1]
  arrays, expected = drawn(case)
  with kernels.target("v6e"), numpy_kernels.interpreted():
    check(run("pallas", arrays, **options), expected, jnp.float32)


@pytest.mark.parametrize(
  "case",
  [
    "tails", "causal_window", "segments_of_both", "stairs_of_a_window", "few_queries",
  ],
)  # fmt: skip
def test_kernel_has_no_races_in_any_order(case):
  options = CASES[case][1]
  arrays, expected = drawn(case)
  with pltpu.force_tpu_interpret_mode(INTERPRETERS["races_and_shuffled"]):
    check(run("pallas", arrays, **options), expected, jnp.float32)


@pytest.mark.parametrize(
  "case",
  [
    "causal_more_queries", "odd_heads", "nothing_seen", "bands_to_both_sides",
    "one_query_of_each_head",
  ],
)  # fmt: skip
def test_jax_agrees_that_nothing_outside_of_arrays_is_used(case):
  """Memory outside of arrays, and that of outputs, holds NaN: above too, but by our interpreter.

  It does so for races as well, in the cases of that test.
  """
  options = CASES[case][1]
  arrays, expected = drawn(case)
  with pltpu.force_tpu_interpret_mode(INTERPRETERS["nan_memory"]):
    check(run("pallas", arrays, **options), expected, jnp.float32)


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize(
  "case", ["tails", "causal", "causal_window", "segments", "odd_heads", "decoding", "few_queries"]
)
def test_bfloat16_kernel_is_as_exact_as_plain_jnp(case, generation):
  """The matrix unit of v6e is deep enough for queries split in two halves; that of v5e is not."""
  options = CASES[case][1]
  arrays, expected = drawn(case, jnp.bfloat16)
  xla = plain_bfloat16(case)
  with kernels.target(generation), numpy_kernels.interpreted():
    actual = run("pallas", arrays, **options)
  assert [x.dtype for x in actual] == [x.dtype for x in xla]
  check(actual, expected, jnp.bfloat16, xla)


@pytest.mark.parametrize("generation", ["v4", "v5e", "v6e"])
@pytest.mark.parametrize("head_dim", [64, 100, 128, 256])
def test_bfloat16_scaling_does_not_round_on_any_generation(generation, head_dim):
  """The scores are so large that rounding the queries would be visible."""
  query, *rest = draw((1, 260, 260, 2, 1, head_dim, 64), jnp.bfloat16)
  arrays = (query * 16, *rest)
  options = {"is_causal": True}
  xla = run("xla", arrays, **options)
  with kernels.target(generation), numpy_kernels.interpreted():
    actual = run("pallas", arrays, **options)
  compare(actual, arrays, jnp.bfloat16, xla, **options)


@pytest.mark.parametrize("model", shapes.ATTENTION)
def test_shapes_of_the_models(model):
  """Uses one KV head of each model, 150 tokens, and a window of 40 where the model has one.

  Interpreting all heads at full length would take hours; heads are independent grid steps.
  """
  family = shapes.ATTENTION[model]
  arrays = draw((1, 150, 150, family.group, 1, family.head_dim, family.head_dim), jnp.bfloat16)
  options = {"is_causal": True, "logits_soft_cap": family.soft_cap}
  if family.window:
    options["local_window_size"] = (40 - 1, 0)
  xla = run("xla", arrays, **options)
  with numpy_kernels.interpreted():
    actual = run("pallas", arrays, **options)
  compare(actual, arrays, jnp.bfloat16, xla, **options)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(
  length=st.integers(1, 300),
  num_keys=st.integers(1, 300),
  num_kv_heads=st.integers(1, 2),
  group=st.integers(1, 3),
  head_dim=st.sampled_from([8, 12, 40, 64]),
  is_causal=st.booleans(),
  window=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 200)),
  has_segments=st.booleans(),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  block_sizes=st.sampled_from([SMALL, sizes(256, 128, 256, 128, 256, 256)]),
)
def test_random_shapes_and_masks(
  length, num_keys, num_kv_heads, group, head_dim, is_causal, window, has_segments, dtype,
  block_sizes,
):  # fmt: skip
  shape = (1, length, num_keys, group * num_kv_heads, num_kv_heads, head_dim, head_dim)
  arrays = draw(shape, dtype)
  options = {"is_causal": is_causal, "local_window_size": window, "block_sizes": block_sizes}
  if has_segments:
    options["segment_ids"] = (segments(1, length, 4), segments(1, num_keys, 4, 1))
  xla = run("xla", arrays, **options)
  compare(xla, arrays, dtype, xla, **options)
  with numpy_kernels.interpreted():
    compare(run("pallas", arrays, **options), arrays, dtype, xla, **options)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_matches_jax_nn_dot_product_attention(implementation):
  """Shared arguments mean the same as in `jax.nn.dot_product_attention`."""
  query, key, value, *_ = draw((2, 130, 130, 4, 2, 16, 16))
  options = {"is_causal": True, "local_window_size": (20, 5), "scale": 0.3}
  expected = jax.nn.dot_product_attention(query, key, value, **options)
  with numpy_kernels.interpreted():
    actual = flash_attention(query, key, value, implementation=implementation, **options)
  assert_close(actual, np.asarray(expected, np.float64), jnp.float32)
