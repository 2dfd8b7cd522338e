"""Rotary embeddings under jax's transformations, and their errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ll3m_kernels import explain, rotary_embedding
from ll3m_kernels.rotary import kernel
from tests.kernels.rotary.oracle import (
  IMPLEMENTATIONS,
  draw,
  loss,
  oracle,
  sharding_of,
)
from tests.kernels.tolerances import assert_close


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap(interpreted, implementation):
  drawn = [draw(2, 20, (2, 1), 8, seed=seed) for seed in range(2)]
  query, key = (jnp.stack([arrays[i] for arrays, _ in drawn]) for i in (0, 1))
  positions = jnp.stack([positions for _, positions in drawn])
  function = jax.jit(
    jax.grad(functools.partial(loss, implementation=implementation), argnums=(0, 1))
  )
  for axis in (0, None):
    shared = positions if axis == 0 else positions[0]
    mapped = jax.vmap(function, in_axes=(0, 0, axis))(query, key, shared)
    for i in range(2):
      alone = function(query[i], key[i], positions[i if axis == 0 else 0])
      for ours, theirs in zip(mapped, alone, strict=True):
        assert_close(ours[i], np.asarray(theirs, np.float64), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpoint_and_jit(interpreted, implementation):
  arrays, positions = draw(2, 20, (2, 1), 8)
  function = functools.partial(loss, implementation=implementation)
  expected = jax.grad(function, argnums=(0, 1))(*arrays[:2], positions)
  actual = jax.jit(jax.grad(jax.checkpoint(function), argnums=(0, 1)))(*arrays[:2], positions)
  for ours, theirs in zip(actual, expected, strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives(interpreted, implementation):
  """Compares a directional derivative with central differences of the float64 oracle."""
  (query, key, step, _), positions = draw(1, 6, (1, 1), 8)
  function = functools.partial(loss, implementation=implementation)
  first = lambda q: jnp.sum(jax.grad(function)(q, key, positions) * step)  # noqa: E731
  actual = jax.grad(first)(query)

  turned_key = oracle(key, positions)

  def gradient(query):
    return oracle(np.sin(2 * oracle(query, positions)) + turned_key**2, positions, sign=-1)

  query, step = np.asarray(query, np.float64), 1e-5 * np.asarray(step, np.float64)
  expected = (gradient(query + step) - gradient(query - step)) / 2e-5
  assert_close(actual, expected, jnp.float32)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_gradients_through_a_vmap_whose_keys_are_shared(interpreted, implementation):
  """The keys do not depend on the mapped queries, so their cotangents are summed into one."""
  (query, key, *_), positions = draw(1, 6, (2, 1), 8)
  queries = jnp.stack([query, 2 * query, -query])

  def total(queries, keys):
    weights = jnp.arange(1.0, 4).reshape(3, 1, 1, 1, 1)
    return jnp.sum(jnp.sin(queries)) + jnp.sum(jnp.cos(keys) * weights)

  def rotate(query, key):
    return rotary_embedding(query, key, positions, implementation=implementation)

  def mapped(queries, key):
    return total(*jax.vmap(lambda query: rotate(query, key))(queries))

  def one_by_one(queries, key):
    return total(*(jnp.stack(x) for x in zip(*(rotate(q, key) for q in queries), strict=True)))

  expected = jax.jit(jax.grad(one_by_one, (0, 1)))(queries, key)
  for ours, theirs in zip(jax.jit(jax.grad(mapped, (0, 1)))(queries, key), expected, strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


@pytest.mark.parametrize("fetched", [64, 2])
def test_many_blocks_in_the_plain_interpreter(retraced, interpreted, monkeypatch, fetched):
  """This interpreter does not support `pl.program_id` inside a condition."""
  monkeypatch.setattr(kernel, "_BLOCK_BYTES", 2**14)
  monkeypatch.setattr(kernel, "_TOKENS", 128)
  monkeypatch.setattr(kernel, "_BLOCKS_OF_POSITIONS", fetched)
  (query, key, *_), positions = draw(1, 300, (2, 1), 16)
  rotated = rotary_embedding(query, key, positions, implementation="pallas")
  for ours, whole in zip(rotated, (query, key), strict=True):
    assert_close(ours, oracle(whole, positions), jnp.float32)


def test_forward_mode_is_refused():
  arrays, positions = draw(1, 4, (1, 1), 8)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    jax.jvp(lambda q: rotary_embedding(q, arrays[1], positions), arrays[:1], arrays[:1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_positions_are_saved_for_the_backward_pass(interpreted, implementation):
  arrays, positions = draw(1, 20, (2, 1), 8)
  function = functools.partial(rotary_embedding, implementation=implementation)
  _, vjp = jax.vjp(lambda *x: function(*x, positions), *arrays[:2])
  kept = [x for x in jax.tree.leaves(vjp) if x.size > 1]
  assert [(x.shape, x.dtype) for x in kept] == [((1, 20), np.int32)]


@jax.enable_x64(True)
def test_x64(monkeypatch):
  monkeypatch.setattr(kernel, "_BLOCK_BYTES", 2**14)
  monkeypatch.setattr(kernel, "_TOKENS", 128)
  monkeypatch.setattr(kernel, "_BLOCKS_OF_POSITIONS", 2)
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 300, n, 16)), jnp.float32) for n in (3, 2))
  positions = jnp.asarray(rng.integers(0, 2**20, (1, 300)))
  assert positions.dtype == np.int64

  def run(implementation):
    def f(*x):
      q, k = rotary_embedding(*x, positions, implementation=implementation)
      return jnp.sum(q**3) + jnp.sum(k**3)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(q, k)

  theirs = run("xla")
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    ours = run("pallas")
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())
  lowered = jax.export.export(jax.jit(rotary_embedding), platforms=["tpu"])(q, k, positions)
  assert "tpu_custom_call" in lowered.mlir_module()
  wide = [x.astype(jnp.float64) for x in (q, k)]
  assert rotary_embedding(*wide, positions)[0].dtype == np.float64


def test_the_lowering_platform_decides():
  """Lowered for a TPU, long rows use the kernel and short rows do not."""
  for length, has_kernel in ((128, True), (127, False), (1, False)):
    (query, key, *_), positions = draw(2, length, (2, 1), 8)
    for platform in ("tpu", "cpu"):
      exported = jax.export.export(jax.jit(rotary_embedding), platforms=[platform])
      text = exported(query, key, positions).mlir_module()
      assert ("tpu_custom_call" in text) == (has_kernel and platform == "tpu")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda q, k, p: (q[0], k, p, {}), r"query and key must be \[B, T, heads, H\]"),
    (lambda q, k, p: (q, k[:, :3], p, {}), r"B and T, got \(2, 20, 2, 8\)"),
    (lambda q, k, p: (q, k[..., :4], p, {}), "query and key .* head dim, got 8 and 4"),
    (lambda q, k, p: (q.astype(int), k, p, {}), "query must be floating, got int32"),
    (lambda q, k, p: (q, k.astype(int), p, {}), "key must be floating, got int32"),
    (lambda q, k, p: (q, k, p[:1], {}), r"positions must have shape \(2, 20\), got \(1, 20\)"),
    (lambda q, k, p: (q, k, p * 1.0, {}), "positions must be integers, got float32"),
    (lambda q, k, p: (q, k, p, {"rotary_dim": 3}), r"even and within 2\.\.8, got 3"),
    (lambda q, k, p: (q, k, p, {"rotary_dim": 10}), r"even and within 2\.\.8, got 10"),
    (lambda q, k, p: (q, k, p, {"rotary_dim": 0}), r"even and within 2\.\.8, got 0"),
    (lambda q, k, p: (q, k, p, {"theta": 0.0}), "theta must be .* of at least 0.001, got 0.0"),
    (
      lambda q, k, p: (q, k, p, {"theta": float("inf")}),
      "theta must be a finite number .*, got inf",
    ),
  ],
)
def test_bad_input_is_explained(unchecked, change, message):
  (query, key, *_), positions = draw(2, 20, (2, 1), 8)
  query, key, positions, options = change(query, key, positions)
  with pytest.raises(ValueError, match=message):
    rotary_embedding(query, key, positions, **options)


def test_positions_that_do_not_fit_are_refused(unchecked):
  (query, key, *_), positions = draw(1, 4, (1, 1), 8)
  positions = np.asarray(positions, np.int64)
  whole = rotary_embedding(query, key, positions)[0]
  assert_close(whole, oracle(query, positions), jnp.float32)
  for function in (rotary_embedding, functools.partial(explain, rotary_embedding)):
    with pytest.raises(ValueError, match="positions must fit in int32, got 4294967296"):
      function(query, key, positions + (positions == positions.max()) * (2**32 - positions))


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((2, 20, 2, 8), jnp.float16, "query: expected bfloat16 or float32, got float16"),
    ((2, 0, 2, 8), jnp.float32, r"query: .* got shape \(2, 0, 2, 8\)"),
    ((1, 4, 2, 520), jnp.float32, "query: expected a head dim of at most 512, got 520"),
  ],
)
def test_unsupported_arguments_are_named(shape, dtype, message):
  query, positions = jnp.ones(shape, dtype), jnp.zeros(shape[:2], jnp.int32)
  with pytest.raises(NotImplementedError, match=message):
    rotary_embedding(query, query, positions, implementation="pallas")
  turned, _ = rotary_embedding(query, query, positions)  # plain jnp supports it
  np.testing.assert_array_equal(turned, query)


def test_an_unknown_implementation_is_named():
  (query, key, *_), positions = draw(1, 4, (1, 1), 8)
  with pytest.raises(NotImplementedError, match="implementation='triton' does not exist"):
    rotary_embedding(query, key, positions, implementation="triton")


def test_explain():
  def say(length, dtype=jnp.bfloat16, **options):
    query, key = (jax.ShapeDtypeStruct((2, length, n, 128), dtype) for n in (32, 8))
    positions = jax.ShapeDtypeStruct((2, length), jnp.int32)
    return explain(rotary_embedding, query, key, positions, **options)

  text = say(4096)
  assert text.startswith("rotary_embedding: pallas where lowered for TPU, else xla")
  assert "blocks of 512 tokens of 16 query heads and 4 key heads" in text
  assert "rows of 1 tokens are too short" in say(1)
  assert say(1, implementation="pallas").startswith("rotary_embedding: pallas")
  assert "expected bfloat16 or float32, got float16" in say(4096, jnp.float16)
  with pytest.raises(ValueError, match="rotary_dim must be even"):
    say(4096, rotary_dim=7)
  with pytest.raises(TypeError, match="base"):
    say(4096, base=1e4)
  # On a mesh, blocks are those of the heads that one device has.
  assert "16 query heads and 4 key heads" in say(4096)
  assert "8 query heads and 2 key heads" in say(4096, sharding=sharding_of(1, 2, 4))
