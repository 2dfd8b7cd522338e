"""Rotary embeddings against float64 NumPy, in both implementations, and what jax does to them.

Dimensions: B batch, T tokens, N query heads, K KV heads, H head dim, R rotated dims.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, PartitionSpec

from benchmarks import shapes
from ll3m_kernels import Sharding, rotary_embedding
from ll3m_kernels.rotary import kernel
from ll3m_kernels.rotary.angles import Rotation
from ll3m_kernels.rotary.api import explain
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = ["xla", "pallas"]
LAST = 2**20 - 1


def oracle(x, positions, theta=1e4, rotary_dim=None, sign=1):
  """Rotates [B, T, heads, H] in float64; sign -1 turns back."""
  x = np.asarray(x, np.float64)
  size = x.shape[-1] if rotary_dim is None else rotary_dim
  frequencies = (1.0 / theta ** (np.arange(0, size, 2) / size)).astype(np.float32)
  angles = np.asarray(positions, np.float64)[..., None, None] * frequencies.astype(np.float64)
  cos, sin = np.cos(angles), sign * np.sin(angles)
  first, second = x[..., : size // 2], x[..., size // 2 : size]
  return np.concatenate(
    [first * cos - second * sin, second * cos + first * sin, x[..., size:]], axis=-1
  )


def draw(batch, length, heads, size, dtype=jnp.float32, most=4096, seed=0):
  """Returns query, key, their cotangents, and positions that restart and are not sorted."""
  rng = np.random.default_rng(seed)
  arrays = [jnp.asarray(rng.normal(size=(batch, length, n, size)), dtype) for n in (*heads, *heads)]
  return arrays, jnp.asarray(rng.integers(0, most + 1, (batch, length)), jnp.int32)


def rotate_and_back(implementation, arrays, positions, races=False, **options):
  """Returns rotated query and key, and the gradients for the cotangents."""
  query, key, *cotangents = arrays

  def run(query, key, *cotangents):
    rotated, vjp = jax.vjp(
      lambda *x: rotary_embedding(*x, positions, implementation=implementation, **options),
      query,
      key,
    )
    return *rotated, *vjp(tuple(cotangents))

  if implementation == "xla":
    return jax.jit(run)(query, key, *cotangents)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=races)):
    return jax.jit(run)(query, key, *cotangents)


def check(arrays, positions, implementations=IMPLEMENTATIONS, **options):
  """Holds both implementations against the oracle, values and gradients."""
  dtype = arrays[0].dtype
  of_oracle = {k: v for k, v in options.items() if k in ("theta", "rotary_dim")}
  expected = [
    oracle(x, positions, sign=sign, **of_oracle)
    for x, sign in zip(arrays, (1, 1, -1, -1), strict=True)
  ]
  plain = [None] * 4
  if "xla" in implementations or dtype == jnp.bfloat16:
    plain = rotate_and_back("xla", arrays, positions, **of_oracle)
  for implementation in implementations:
    actual = plain
    if implementation == "pallas":
      actual = rotate_and_back("pallas", arrays, positions, **options)
    for ours, right, theirs, like, name in zip(
      actual, expected, plain, arrays, ("query", "key", "query_bar", "key_bar"), strict=True
    ):
      assert ours.dtype == like.dtype
      assert_close(ours, right, dtype, theirs, f"{implementation} {name}")


@pytest.mark.parametrize(
  ("batch", "length", "heads", "size", "rotary_dim"),
  [
    (2, 21, (3, 1), 8, None),
    (2, 130, (2, 2), 16, 6),  # longer than 128 tokens, and no multiple of it
    (1, 1, (4, 2), 64, None),  # decoding
    (1, 24, (2, 1), 96, None),
    (1, 24, (1, 2), 100, None),  # halves that are no multiple of 8 rows
  ],
)
def test_values_and_gradients(batch, length, heads, size, rotary_dim):
  arrays, positions = draw(batch, length, heads, size)
  check(arrays, positions, rotary_dim=rotary_dim)


@pytest.mark.parametrize("model", shapes.ROTARY)
def test_the_models_shapes(model):
  shape = shapes.ROTARY[model]
  heads = shape.num_heads, shape.num_kv_heads
  arrays, positions = draw(1, 20, heads, shape.head_dim, jnp.bfloat16)
  check(arrays, positions, rotary_dim=shape.rotary_dim)


def test_without_races():
  arrays, positions = draw(2, 300, (3, 2), 16)
  check(arrays, positions, ["pallas"], rotary_dim=12, races=True)


@pytest.mark.parametrize(
  ("heads_of_a_block", "fetched", "steps"),
  [
    (7, 64, 1),
    (4, 2, 2),  # a tail of heads; positions in two fetches, and a tail of them
    (3, 1, 3),  # more steps than blocks of keys
    (0, 64, 5),  # not even one head each is small enough
  ],
)
def test_blocks(monkeypatch, heads_of_a_block, fetched, steps):
  """Of 128 tokens, and a tail of them."""
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
def test_cos_and_sin_hold_at_any_position(implementation, theta):
  """Unit vectors show them: the first half of each turns into (cos, sin).

  2e-5 up to 4,096 and 2e-3 up to a million would do (bfloat16's half ulp); documented is 1e-6.
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
def test_position_0_and_what_is_not_rotated_pass_unchanged(implementation):
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


@pytest.fixture
def interpreted(monkeypatch):
  """Plain interpret mode: jax's TPU interpreter supports neither vmap nor checkpoint."""
  monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def loss(query, key, positions, **options):
  """A scalar that is not linear in what is rotated, so that it has second derivatives."""
  query, key = rotary_embedding(query, key, positions, **options)
  return jnp.sum(jnp.sin(query) ** 2) + jnp.sum(query[:, :, :1] * key[:, :, :1] ** 2)


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
  """Along a direction, by central differences of the float64 oracle's gradient."""
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
  """The keys do not depend on what is mapped over: their cotangents are one, the sum of all."""
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
def test_many_blocks_in_the_plain_interpreter(interpreted, monkeypatch, fetched):
  """It does not know a program's id inside of a condition."""
  monkeypatch.setattr(kernel, "_BLOCK_BYTES", 2**14)
  monkeypatch.setattr(kernel, "_TOKENS", 128)
  monkeypatch.setattr(kernel, "_BLOCKS_OF_POSITIONS", fetched)
  (query, key, *_), positions = draw(1, 300, (2, 1), 16)
  rotated = rotary_embedding(query, key, positions, implementation="pallas")
  for ours, whole in zip(rotated, (query, key), strict=True):
    assert_close(ours, oracle(whole, positions), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_positions(implementation):
  arrays, positions = draw(1, 40, (1, 1), 64, most=2**20)
  positions = -positions
  turned, *_ = rotate_and_back(implementation, arrays, positions)
  assert np.abs(np.asarray(turned, np.float64) - oracle(arrays[0], positions)).max() <= 5e-6


def test_positions_that_do_not_fit_are_refused(unchecked):
  (query, key, *_), positions = draw(1, 4, (1, 1), 8)
  positions = np.asarray(positions, np.int64)
  whole = rotary_embedding(query, key, positions)[0]
  assert_close(whole, oracle(query, positions), jnp.float32)
  for function in (rotary_embedding, explain):
    with pytest.raises(ValueError, match="positions must fit in int32, got 4294967296"):
      function(query, key, positions + (positions == positions.max()) * (2**32 - positions))


def test_forward_mode_is_refused():
  arrays, positions = draw(1, 4, (1, 1), 8)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    jax.jvp(lambda q: rotary_embedding(q, arrays[1], positions), arrays[:1], arrays[:1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_positions_are_kept(interpreted, implementation):
  arrays, positions = draw(1, 20, (2, 1), 8)
  function = functools.partial(rotary_embedding, implementation=implementation)
  _, vjp = jax.vjp(lambda *x: function(*x, positions), *arrays[:2])
  kept = [x for x in jax.tree.leaves(vjp) if x.size > 1]
  assert [(x.shape, x.dtype) for x in kept] == [((1, 20), np.int32)]


@pytest.mark.parametrize(
  ("implementation", "check_vma"), [("xla", True), ("xla", False), ("pallas", False)]
)
def test_in_a_shard_map_of_the_caller(interpreted, implementation, check_vma):
  """Batch and heads are split; a single KV head is shared, and stays so."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "mp"))
  (query, key, *_), positions = draw(4, 10, (4, 1), 8)
  mapped = in_shard_map(mesh, implementation, check_vma)
  for ours, whole in zip(jax.jit(mapped)(query, key, positions), (query, key), strict=True):
    assert_close(ours, oracle(whole, positions), jnp.float32)


def test_the_kernel_lowers_under_check_vma():
  """jax's interpreter of kernels does not run there, but lowering for a TPU does."""
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "mp"))
  (query, key, *_), positions = draw(4, 130, (4, 1), 8)
  mapped = in_shard_map(mesh, None, check_vma=True)
  grad = jax.grad(lambda *x: sum(jnp.sum(y**2) for y in mapped(*x)), argnums=(0, 1))
  exported = jax.export.export(jax.jit(grad), platforms=["tpu"])(query, key, positions)
  assert exported.mlir_module().count("tpu_custom_call") == 2


def in_shard_map(mesh, implementation, check_vma):
  rows, heads = PartitionSpec("dp"), PartitionSpec("dp", None, "mp")
  return jax.shard_map(
    functools.partial(rotary_embedding, implementation=implementation),
    mesh=mesh,
    in_specs=(heads, rows, rows),
    out_specs=(heads, rows),
    check_vma=check_vma,
  )


def sharding_of(*sizes):
  mesh = jax.make_mesh(sizes, ("dp", "fsdp", "mp"), axis_types=(AxisType.Auto,) * 3)
  return Sharding(mesh)


@pytest.mark.parametrize(
  ("implementation", "sizes", "heads"),
  [
    ("xla", (2, 2, 2), (4, 2)),
    ("pallas", (2, 2, 2), (4, 2)),
    ("pallas", (1, 2, 4), (8, 2)),  # the key heads stay whole
    ("pallas", (2, 2, 2), (9, 3)),  # all do
  ],
)
def test_any_mesh_gives_what_one_device_gives(interpreted, implementation, sizes, heads):
  (query, key, *_), positions = draw(4, 10, heads, 8)
  function = jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1))
  expected = function(query, key, positions)
  actual = jax.jit(functools.partial(function, sharding=sharding_of(*sizes)))(query, key, positions)
  for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


def test_a_batch_that_cannot_be_split_is_explained():
  (query, key, *_), positions = draw(3, 10, (2, 2), 8)
  with pytest.raises(ValueError, match="must be a multiple of dp x fsdp = 4, got"):
    rotary_embedding(query, key, positions, sharding=sharding_of(2, 2, 2))


X64 = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.experimental.pallas import tpu as pltpu
from ll3m_kernels import rotary_embedding
from ll3m_kernels.rotary import kernel
kernel._BLOCK_BYTES, kernel._TOKENS, kernel._BLOCKS_OF_POSITIONS = 2**14, 128, 2
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
for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
  assert a.dtype == b.dtype == np.float32
  np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())
lowered = jax.export.export(jax.jit(rotary_embedding), platforms=["tpu"])(q, k, positions)
assert "tpu_custom_call" in lowered.mlir_module()
wide = [x.astype(jnp.float64) for x in (q, k)]
assert rotary_embedding(*wide, positions)[0].dtype == np.float64
"""


def test_x64():
  done = subprocess.run([sys.executable, "-c", X64], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_the_platform_of_lowering_chooses():
  """Lowered for a TPU, long rows have the kernel in them and short rows have not."""
  for length, has_kernel in ((128, True), (127, False), (1, False)):
    (query, key, *_), positions = draw(2, length, (2, 1), 8)
    for platform in ("tpu", "cpu"):
      exported = jax.export.export(jax.jit(rotary_embedding), platforms=[platform])
      text = exported(query, key, positions).mlir_module()
      assert ("tpu_custom_call" in text) == (has_kernel and platform == "tpu")


@pytest.fixture
def unchecked():
  """Switches off the run-time checks of annotations that only tests have."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda q, k, p: (q[0], k, p, {}), r"query and key must be \[B, T, heads, H\]"),
    (lambda q, k, p: (q, k[:, :3], p, {}), "with one B and T, got"),
    (lambda q, k, p: (q, k[..., :4], p, {}), "query and key must have one head dim, got 8 and 4"),
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


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((2, 20, 2, 8), jnp.float16, "query: expected bfloat16 or float32, got float16"),
    ((2, 0, 2, 8), jnp.float32, r"query: it is empty, \(2, 0, 2, 8\)"),
    ((1, 4, 2, 520), jnp.float32, "query: expected a head dim of at most 512, got 520"),
  ],
)
def test_what_the_kernel_cannot_serve_is_named(shape, dtype, message):
  query, positions = jnp.ones(shape, dtype), jnp.zeros(shape[:2], jnp.int32)
  with pytest.raises(NotImplementedError, match=message):
    rotary_embedding(query, query, positions, implementation="pallas")
  turned, _ = rotary_embedding(query, query, positions)  # plain jnp takes it
  np.testing.assert_array_equal(turned, query)


def test_an_unknown_implementation_is_named():
  (query, key, *_), positions = draw(1, 4, (1, 1), 8)
  with pytest.raises(NotImplementedError, match="implementation='triton' does not exist"):
    rotary_embedding(query, key, positions, implementation="triton")


def test_explain():
  def say(length, dtype=jnp.bfloat16, **options):
    query, key = (jax.ShapeDtypeStruct((2, length, n, 128), dtype) for n in (32, 8))
    positions = jax.ShapeDtypeStruct((2, length), jnp.int32)
    return explain(query, key, positions, **options)

  text = say(4096)
  assert text.startswith("rotary_embedding: pallas where lowered for TPU, else xla")
  assert "blocks of 512 tokens of 16 query heads and 4 key heads" in text
  assert "rows of 1 tokens are too short to be worth a kernel" in say(1)
  assert say(1, implementation="pallas").startswith("rotary_embedding: pallas")
  assert "expected bfloat16 or float32, got float16" in say(4096, jnp.float16)
  with pytest.raises(ValueError, match="rotary_dim must be even"):
    say(4096, rotary_dim=7)
  with pytest.raises(TypeError, match="base"):
    say(4096, base=1e4)
  # What a device has of it: two of eight heads, one of two keys.
  assert "16 query heads and 4 key heads" in say(4096)
  assert "8 query heads and 2 key heads" in say(4096, sharding=sharding_of(1, 2, 4))
