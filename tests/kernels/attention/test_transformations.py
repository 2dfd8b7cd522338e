"""Attention under jax transformations, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import ll3m_kernels as kernels
from ll3m_kernels import ATTENTION_RESIDUALS, flash_attention
from tests.kernels import numpy_kernels
from tests.kernels.attention.sizes import sizes
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = ["xla", "pallas"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Runs kernels in plain interpret mode: jax's TPU interpreter has neither vmap nor checkpoint."""
  monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def draw(*leading, length=20, heads=(2, 1), size=8, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = [(*leading, 2, length, n, size) for n in (heads[0], heads[1], heads[1])]
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def loss(query, key, value, **options):
  output = flash_attention(query, key, value, is_causal=True, **options)
  return jnp.sum(output.astype(jnp.float32) ** 2)


def grads(function):
  return jax.grad(function, argnums=(0, 1, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap(implementation):
  arrays = draw(3)
  ids = jnp.asarray(np.arange(2 * 3 * 20).reshape(3, 2, 20) // 7)
  function = grads(
    lambda q, k, v, ids: loss(q, k, v, segment_ids=ids, implementation=implementation)
  )
  mapped = jax.vmap(function)(*arrays, ids)
  for i in range(3):
    alone = function(*(x[i] for x in arrays), ids[i])
    for ours, theirs in zip(mapped, alone, strict=True):
      assert_close(ours[i], np.asarray(theirs, np.float64), jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "policy", [None, jax.checkpoint_policies.save_only_these_names("flash_attention_output")]
)
def test_checkpoint_and_jit(implementation, policy):
  arrays = draw()
  function = functools.partial(loss, implementation=implementation)
  expected = grads(function)(*arrays)
  actual = jax.jit(grads(jax.checkpoint(function, policy=policy)))(*arrays)
  for ours, theirs in zip(actual, expected, strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


def test_forward_pass_runs_once_if_its_results_are_saved_by_name():
  """If a remat policy saves output and residual, the backward pass runs only its own kernel."""
  function = functools.partial(loss, implementation="pallas")
  counts = {}
  for policy in (
    jax.checkpoint_policies.save_only_these_names(*ATTENTION_RESIDUALS),
    jax.checkpoint_policies.nothing_saveable,
  ):
    text = str(jax.make_jaxpr(grads(jax.checkpoint(function, policy=policy)))(*draw()))
    counts[policy] = text.count("name=flash_attention_forward")
  assert list(counts.values()) == [1, 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives_are_refused(implementation):
  arrays = draw(length=4)
  function = functools.partial(loss, implementation=implementation)
  with pytest.raises(NotImplementedError, match="flash_attention has no second derivatives"):
    jax.grad(lambda *x: jnp.sum(jax.grad(function)(*x)))(*arrays)


@jax.enable_x64(True)
def test_x64_mode_gives_float32_results(monkeypatch):
  monkeypatch.undo()  # leave plain interpret mode
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 300, n, 16)), jnp.float32) for n in (2, 1, 1))
  ids = jnp.asarray(np.arange(300)[None] // 90)
  blocks = sizes(128, 128, 256, 128, 128, 256)

  def run(implementation, **options):
    options |= {"is_causal": True, "segment_ids": ids, "local_window_size": (99, 3)}

    def f(*x):
      return jnp.sum(flash_attention(*x, implementation=implementation, **options) ** 2)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v)

  theirs = run("xla")
  with numpy_kernels.interpreted():
    ours = run("pallas", block_sizes=blocks)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())
  lowered = jax.jit(lambda *x: flash_attention(*x, is_causal=True))
  jax.export.export(lowered, platforms=["tpu"])(q, k, v)
  wide = [x.astype(jnp.float64) for x in (q, k, v)]
  assert flash_attention(*wide).dtype == np.float64


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda q, k, v: (q[0], k, v, {}), r"query must be \[batch, length, heads, head dim\], got"),
    (lambda q, k, v: (q, k[..., :4], v, {}), "query and key .* head dim, got 8 and 4"),
    (lambda q, k, v: (q, k[:, :5], v, {}), "key and value in length and heads, got"),
    (lambda q, k, v: (q[:1], k, v, {}), "must agree in batch"),
    (
      lambda q, k, v: (q[:, :, :1], jnp.tile(k, (1, 1, 2, 1)), jnp.tile(v, (1, 1, 2, 1)), {}),
      r"query heads \(1\) must be a multiple of KV heads \(2\)",
    ),
    (lambda q, k, v: (q.astype(jnp.int32), k, v, {}), "query must be floating, got int32"),
    (
      lambda q, k, v: (q, k, v, {"local_window_size": -1}),
      "must be a whole number of at least 0, got -1",
    ),
    (lambda q, k, v: (q, k, v, {"local_window_size": (3, -2)}), "of at least 0, got -2"),
    (lambda q, k, v: (q, k, v, {"local_window_size": 2.5}), "at least 0, got 2.5"),
    (lambda q, k, v: (q, k, v, {"local_window_size": True}), "at least 0, got True"),
    (
      lambda q, k, v: (q, k, v, {"local_window_size": (1, 2, 3)}),
      r"left, right\), got \(1, 2, 3\)",
    ),
    (lambda q, k, v: (q, k, v, {"is_causal": "no"}), "is_causal must be True or False, got 'no'"),
    (lambda q, k, v: (q, k, v, {"scale": float("nan")}), "scale must be a finite number, got nan"),
    (lambda q, k, v: (q, k, v, {"scale": jnp.ones(())}), "finite number, got an array of shape"),
    (
      lambda q, k, v: (q, k, v, {"segment_ids": (None,) * 3}),
      "segment_ids must be .* pair .*, got 3",
    ),
    (lambda q, k, v: (q, k, v, {"block_sizes": 128}), "block_sizes must be a BlockSizes or None"),
    (lambda q, k, v: (q, k, v, {"sharding": "x"}), "sharding must be a Sharding or None, got 'x'"),
    (lambda q, k, v: (q, k[:, :0], v[:, :0], {}), r"key must not be empty, got \(2, 0,"),
    (lambda q, k, v: (None, k, v, {}), "query must be an array, got NoneType"),
    (
      lambda q, k, v: (q, k, v, {"segment_ids": np.full((2, 20), 2**40)}),
      "segment ids of the query must fit in int32, got 1099511627776",
    ),
    (lambda q, k, v: (q, k, v, {"logits_soft_cap": 0.0}), "must be a positive number, got 0.0"),
    (
      lambda q, k, v: (q, k, v, {"segment_ids": jnp.ones((2, 3), int)}),
      r"query must .* \(2, 20\), got",
    ),
    (lambda q, k, v: (q, k, v, {"segment_ids": jnp.ones((2, 20))}), "must be integers, got float"),
  ],
)
def test_invalid_arguments_are_refused(unchecked, change, message):
  *arrays, options = change(*draw())
  with pytest.raises(ValueError, match=message):
    flash_attention(*arrays, **options)


def test_explain_checks_arguments_as_the_call_does(unchecked):
  arrays = draw()
  with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
    kernels.explain("flash_attention", *arrays, scale=float("nan"))
  with pytest.raises(TypeError, match="unexpected keyword argument 'is_casual'"):
    kernels.explain("flash_attention", *arrays, is_casual=True)


@pytest.mark.parametrize(
  ("window", "same"), [(2**31 - 1, (20, 20)), ((0, 2**31 - 1), (0, 20)), ((2**40, 2), (20, 2))]
)
def test_windows_may_be_longer_than_any_sequence(window, same):
  arrays = draw()
  ours = flash_attention(*arrays, local_window_size=window, implementation="pallas")
  expected = flash_attention(*arrays, local_window_size=same, implementation="xla")
  np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def test_gradient_of_a_vmap_with_an_unmapped_output():
  query, key, value = draw()
  values = jnp.stack([value, 2 * value])

  def total(query):
    mapped = jax.vmap(lambda value: flash_attention(query, key, value, return_residual=True))
    return sum(jnp.sum(x) for x in mapped(values))

  def summed(query):
    results = (flash_attention(query, key, value, return_residual=True) for value in values)
    return sum(jnp.sum(x) for pair in results for x in pair)

  np.testing.assert_allclose(jax.grad(total)(query), jax.grad(summed)(query), rtol=1e-5, atol=1e-5)


def test_invalid_block_sizes_are_refused():
  arrays = draw(length=400)
  for six, message in (
    ((100, 128, 128, 128, 128, 128), "block_sizes.block_q must be a multiple of 128 or at least"),
    (
      (128, 128, 200, 128, 128, 128),
      r"block_kv must be a multiple of block_kv_compute \(128\), got 200",
    ),
    ((0, 128, 128, 128, 128, 128), "block_sizes.block_q must be a positive integer, got 0"),
  ):
    with pytest.raises(ValueError, match=message):
      flash_attention(*arrays, block_sizes=sizes(*six))
  huge = jax.ShapeDtypeStruct((1, 2**15, 1, 256), jnp.float32)
  with pytest.raises(ValueError, match=r"need \d+\.\d MiB of vector memory in the forward pass"):
    jax.eval_shape(
      functools.partial(flash_attention, block_sizes=sizes(*[2**14] * 6)), huge, huge, huge
    )


def test_unsupported_arguments_are_named():
  arrays = draw(size=300)
  with pytest.raises(NotImplementedError, match="query: expected a head dim of at most 256"):
    flash_attention(*arrays, implementation="pallas")
  assert flash_attention(*arrays).shape == arrays[0].shape  # plain jnp supports it
  half = [x.astype(jnp.float16) for x in draw()]
  with pytest.raises(NotImplementedError, match="query: expected bfloat16 or float32"):
    flash_attention(*half, implementation="pallas")
  with pytest.raises(NotImplementedError, match="implementation='triton' does not exist"):
    flash_attention(*half, implementation="triton")
  with pytest.raises(NotImplementedError, match="block_sizes: .* 'xla' has no blocks"):
    flash_attention(*half, implementation="xla", block_sizes=sizes(*[128] * 6))
