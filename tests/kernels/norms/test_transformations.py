"""The norms under jax's transformations and on meshes, and their errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from ll3m_kernels import (
  Sharding,
  add_layer_norm,
  add_rms_norm,
  dispatch,
  explain,
  layer_norm,
  rms_norm,
)
from tests.kernels import numpy_kernels
from tests.kernels.tolerances import assert_close


@pytest.fixture
def interpreted(monkeypatch):
  """Plain interpret mode: jax's TPU interpreter supports neither vmap nor checkpoint."""
  monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def draw(*shape, dtype=jnp.float32):
  """Returns (x, residual, scale, bias)."""
  rng = np.random.default_rng(0)
  shapes = (shape, shape, shape[-1:], shape[-1:])
  return [jnp.asarray(rng.normal(1.0, size=s), dtype) for s in shapes]


def loss(x, residual, scale, bias, **options):
  normed, total = add_layer_norm(x, residual, scale, bias, **options)
  again = rms_norm(normed, scale, **options)
  return jnp.sum(jnp.sin(again.astype(jnp.float32))) + jnp.sum(total.astype(jnp.float32) ** 2)


def grads(function):
  return jax.grad(function, argnums=(0, 1, 2, 3))


def assert_same(actual, expected):
  for ours, theirs in zip(actual, expected, strict=True):
    assert_close(ours, np.asarray(theirs, np.float64), jnp.float32)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
@pytest.mark.parametrize("axes", [(0, 0, None, None), (1, 1, 0, 0)])
def test_vmap(implementation, axes):
  x, residual, scale, bias = draw(3, 3, 5, 48)
  if axes[2] == 0:
    scale, bias = scale[None] * jnp.arange(1.0, 4)[:, None], bias[None] * jnp.ones((3, 1))
  arrays = (x, residual, scale, bias)
  function = jax.jit(grads(functools.partial(loss, implementation=implementation)))
  mapped = jax.jit(jax.vmap(function, in_axes=axes))(*arrays)
  for i in range(3):
    taken = [
      a if axis is None else jnp.take(a, i, axis) for a, axis in zip(arrays, axes, strict=True)
    ]
    assert_same([part[i] for part in mapped], function(*taken))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", [None, *dispatch.IMPLEMENTATIONS])
def test_gradients_through_a_vmap_whose_sum_is_shared(implementation):
  """The sum does not depend on the mapped scale, so its cotangents are summed into one."""
  x, residual, *_ = draw(5, 16)
  scales = jnp.arange(3 * 16, dtype=jnp.float32).reshape(3, 16) / 16

  def add(x, residual, scale):
    return add_rms_norm(x, residual, scale, implementation=implementation)

  def total(normed, total):
    return jnp.sum(jnp.sin(normed)) + jnp.sum(total**2 * jnp.arange(1.0, 4)[:, None, None])

  def mapped(x, residual, scales):
    return total(*jax.vmap(lambda scale: add(x, residual, scale))(scales))

  def one_by_one(x, residual, scales):
    return total(*(jnp.stack(y) for y in zip(*(add(x, residual, s) for s in scales), strict=True)))

  arrays, grad = (x, residual, scales), functools.partial(jax.grad, argnums=(0, 1, 2))
  assert_same(jax.jit(grad(mapped))(*arrays), jax.jit(grad(one_by_one))(*arrays))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
def test_checkpoint_and_jit(implementation):
  arrays = draw(2, 5, 48)
  function = functools.partial(loss, implementation=implementation)
  expected = grads(function)(*arrays)
  assert_same(jax.jit(grads(jax.checkpoint(function)))(*arrays), expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", dispatch.IMPLEMENTATIONS)
def test_second_derivatives_are_refused(implementation):
  arrays = draw(4, 16)
  for function, operation in (
    (lambda x, r, s, b: rms_norm(x, s, implementation=implementation), "rms_norm"),
    (
      lambda x, r, s, b: add_layer_norm(x, r, s, b, implementation=implementation)[0],
      "add_layer_norm",
    ),
    (lambda x, r, s, b: add_rms_norm(x, r, s, implementation=implementation)[0], "add_rms_norm"),
  ):
    once = jax.grad(lambda *a, function=function: jnp.sum(function(*a) ** 2))
    with pytest.raises(NotImplementedError, match=f"^{operation} .* second derivatives"):
      jax.grad(lambda *a, once=once: jnp.sum(once(*a)))(*arrays)


@jax.enable_x64(True)
def test_x64():
  rng = np.random.default_rng(0)
  x, r, d = (jnp.asarray(rng.normal(size=(3, 50, 72)), jnp.float32) for _ in range(3))
  s, b = (jnp.asarray(rng.normal(size=72), jnp.float32) for _ in range(2))

  def run(implementation):
    def f(x, r, s, b):
      normed, total = add_layer_norm(x, r, s, b, implementation=implementation)
      return rms_norm(normed, s, epsilon=np.float64(1e-6), implementation=implementation), total

    def both(*arrays):
      results, vjp = jax.vjp(f, *arrays)
      return results, vjp((d, d))

    return jax.jit(both)

  theirs = run("xla")(x, r, s, b)
  for generation in ("v5e", "v5p"):
    with dispatch.target(generation), numpy_kernels.interpreted():
      ours = run("pallas")(x, r, s, b)
    for a, b_ in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      assert a.dtype == b_.dtype == np.float32
      np.testing.assert_allclose(a, b_, rtol=2e-5, atol=2e-5 * np.abs(b_).max())
    with dispatch.target(generation):
      text = jax.export.export(run(None), platforms=["tpu"])(x, r, s, b).mlir_module()
    assert text.count("tpu_custom_call") == 4
  assert rms_norm(x.astype(jnp.float64), s).dtype == np.float64


def make_mesh(*sizes):
  return jax.make_mesh(sizes, ("dp", "fsdp", "mp"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
  ("implementation", "sizes"),
  [("xla", (2, 2, 2)), ("xla", (8, 1, 1)), ("xla", (1, 1, 8)), ("pallas", (2, 2, 2))],
)
def test_any_mesh_gives_the_results_of_one_device(implementation, sizes):
  arrays = draw(8, 3, 48)
  function = functools.partial(loss, implementation=implementation)
  sharding = Sharding(make_mesh(*sizes))
  spread = functools.partial(function, sharding=sharding)
  assert_same(jax.jit(grads(spread))(*arrays), grads(function)(*arrays))
  np.testing.assert_allclose(spread(*arrays), function(*arrays), rtol=1e-5)


def test_gradients_of_weights_are_summed_in_float32():
  """If each device rounded to bfloat16 first, the sum would be off by more than one rounding."""
  x = jnp.ones((8, 1, 128), jnp.bfloat16)
  scale = jnp.ones(128, jnp.bfloat16)
  x_bar = jnp.asarray(256 + np.arange(8), jnp.bfloat16).reshape(8, 1, 1) + jnp.zeros_like(x)
  x_bar = x_bar.at[0].set(2.0**-1)

  def gradient(sharding):
    function = functools.partial(rms_norm, x, epsilon=1e-12, sharding=sharding)
    (scale_bar,) = jax.vjp(function, scale)[1](x_bar)
    return np.asarray(scale_bar, np.float32)

  expected = np.asarray(np.sum(np.asarray(x_bar, np.float32), axis=(0, 1)).astype(jnp.bfloat16))
  np.testing.assert_array_equal(gradient(Sharding(make_mesh(8, 1, 1))), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_callers_shard_map(check_vma):
  arrays = draw(8, 3, 48)
  mesh = make_mesh(4, 1, 2)
  rows, whole = PartitionSpec("dp"), PartitionSpec()

  def shard(*arrays):
    return jax.lax.psum(loss(*arrays), "dp")

  spread = jax.shard_map(
    shard, mesh=mesh, in_specs=(rows, rows, whole, whole), out_specs=whole, check_vma=check_vma
  )
  assert_same(jax.jit(grads(spread))(*arrays), grads(loss)(*arrays))


def test_exports_to_tpu_with_kernels_inside():
  """GSPMD cannot partition a kernel by itself, which shows only when lowering for a TPU."""
  sharding = Sharding(make_mesh(2, 2, 2))
  x = jax.ShapeDtypeStruct(
    (8, 256, 384), jnp.bfloat16, sharding=jax.NamedSharding(sharding.mesh, sharding.rows(3))
  )
  scale = jax.ShapeDtypeStruct((384,), jnp.float32)

  def exported(function):
    exported = jax.export.export(jax.jit(grads(function)), platforms=["tpu"])
    return exported(x, x, scale, scale).mlir_module()

  text = exported(functools.partial(loss, sharding=sharding))
  assert text.count("tpu_custom_call") == 4
  assert "all_gather" not in text
  rows, whole = sharding.rows(3), PartitionSpec()
  for check_vma in (True, False):
    mapped = jax.shard_map(
      lambda *arrays: jax.lax.psum(loss(*arrays), ("dp", "fsdp")),
      mesh=sharding.mesh,
      in_specs=(rows, rows, whole, whole),
      out_specs=whole,
      check_vma=check_vma,
    )
    assert exported(mapped).count("tpu_custom_call") == 4
  with pytest.raises(NotImplementedError, match="cannot be automatically partitioned"):
    exported(loss)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x, r, s, b: (x.astype(jnp.int32), r, s, b), "x must be floating, got int32"),
    (lambda x, r, s, b: (x[0, 0], r, s, b), r"x must have .* dimension, got shape \(\)"),
    (lambda x, r, s, b: (x, r, s[:5], b), r"scale must have shape \(16,\), got \(5,\)"),
    (lambda x, r, s, b: (x, r, s, b[None]), r"bias must have shape \(16,\), got \(1, 16\)"),
    (lambda x, r, s, b: (x, r, s.astype(int), b), "scale must be floating, got int32"),
    (lambda x, r, s, b: (x, r[:1], s, b), r"shape and dtype, got \(4, 16\) float32 and \(1, "),
    (lambda x, r, s, b: (x, r.astype(jnp.bfloat16), s, b), r"and \(4, 16\) bfloat16"),
  ],
)
def test_bad_input_is_explained(unchecked, change, message):
  x, residual, scale, bias = change(*draw(4, 16))
  with pytest.raises(ValueError, match=message):
    add_layer_norm(x, residual, scale, bias)
  with pytest.raises(ValueError, match=message):
    explain("add_layer_norm", x, residual, scale, bias)


def test_a_batch_that_does_not_divide_is_explained():
  x, residual, scale, _ = draw(6, 16)
  with pytest.raises(ValueError, match="first dimension of x must be a multiple of dp x fsdp = 4"):
    add_rms_norm(x, residual, scale, sharding=Sharding(make_mesh(2, 2, 2)))


def test_unsupported_arguments_are_named():
  x, _, scale, bias = draw(4, 16)
  half = x.astype(jnp.float16)
  for arguments, message in (
    ((half, scale), "x: expected bfloat16 or float32, got float16"),
    ((x, scale.astype(jnp.float16)), "scale: expected bfloat16 or float32, got float16"),
    ((x, scale, bias.astype(jnp.float16)), "bias: expected bfloat16 or float32, got float16"),
    ((x[:0], scale), r"x: .* got shape \(0, 16\)"),
    ((jnp.ones((1, 2**20)), jnp.ones(2**20)), "x: .* 1048576 elements .* MiB"),
  ):
    with pytest.raises(NotImplementedError, match=message):
      layer_norm(*arguments, implementation="pallas")
    # Plain jnp supports them, also if the program is lowered for a TPU.
    function = jax.jit(layer_norm)
    assert function(*arguments).shape == arguments[0].shape
    assert (
      "custom_call" not in jax.export.export(function, platforms=["tpu"])(*arguments).mlir_module()
    )
  with pytest.raises(NotImplementedError, match="implementation='triton' does not exist"):
    layer_norm(x, scale, implementation="triton")


def test_explain_says_what_would_run():
  shape = jax.ShapeDtypeStruct
  x, scale = shape((8192, 4096), jnp.bfloat16), shape((4096,), jnp.float32)
  text = explain("rms_norm", x, scale)
  assert text.startswith("rms_norm: pallas where lowered for TPU, else xla; laid out for v5e")
  assert "forward blocks of 256 rows, 64 at a time" in text
  with dispatch.target("v4"):
    assert "backward blocks of 128 rows" in explain("add_rms_norm", x, x, scale=scale, epsilon=1e-6)
  assert "(requested)" in explain("layer_norm", x, scale, scale, implementation="xla")
  half = shape(x.shape, jnp.float16)
  assert "got float16" in explain("layer_norm", half, scale)
  with pytest.raises(TypeError, match="eps"):
    explain("rms_norm", x, scale, eps=1e-6)
  with pytest.raises(
    ValueError, match="unknown operation 'batch_norm'; expected one of .*rms_norm"
  ):
    explain("batch_norm", x, scale)
