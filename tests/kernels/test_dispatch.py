"""The choice of an implementation, and of the TPU that it is laid out for."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import ll3m_kernels as kernels
from ll3m_kernels import dispatch

QUERY = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.bfloat16)
X, SCALE = jax.ShapeDtypeStruct((4, 64), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)


def lowered(platform, **options):
  x = jnp.ones((1, 8, 2, 16), jnp.bfloat16)
  function = jax.jit(lambda x: kernels.flash_attention(x, x, x, **options))
  return jax.export.export(function, platforms=[platform])(x).mlir_module()


@pytest.mark.parametrize(
  ("platform", "options", "has_kernel"),
  [
    ("tpu", {}, True),
    ("cpu", {}, False),
    ("cuda", {}, False),
    ("tpu", {"implementation": "xla"}, False),
    ("tpu", {"implementation": "pallas"}, True),
  ],
)
def test_the_lowering_platform_decides(platform, options, has_kernel):
  """The host has only a CPU."""
  assert ("tpu_custom_call" in lowered(platform, **options)) == has_kernel


def test_the_kernel_itself_does_not_lower_for_a_cpu():
  with pytest.raises(ValueError, match="Only interpret mode is supported on CPU backend"):
    lowered("cpu", implementation="pallas")


@pytest.mark.parametrize("name", dispatch.GENERATIONS)
def test_kernels_are_laid_out_for_the_target(name):
  assert dispatch.generation().name == "v5e"
  with kernels.target(name):
    assert dispatch.generation().name == name
    assert f"laid out for {name} " in kernels.explain("flash_attention", QUERY, QUERY, QUERY)
  assert dispatch.generation().name == "v5e"


def test_one_function_is_traced_for_each_target():
  """The target is part of the key of jax's trace caches."""
  seen = []
  function = jax.jit(lambda x: seen.append(dispatch.generation().name) or x)
  for name in ("v4", "v6e", "v4"):
    with kernels.target(name):
      function(jnp.ones(3))
  assert seen == ["v4", "v6e"]


def test_the_device_of_the_mesh_decides():
  mesh = AbstractMesh((2,), ("dp",), abstract_device=AbstractDevice("TPU v5p", 2, "tpu"))
  with jax.sharding.use_abstract_mesh(mesh):
    assert dispatch.generation().name == "v5p"


def test_a_tpu_without_kernels_gets_plain_jnp():
  mesh = AbstractMesh((), (), abstract_device=AbstractDevice("TPU v3", 1, "tpu"))
  with jax.sharding.use_abstract_mesh(mesh):
    assert dispatch.choose(None, None) == "xla"
    text = kernels.explain("rms_norm", X, SCALE)
  assert text == "rms_norm: xla, on every platform (there are no kernels for TPU v3)"


def test_explanations_say_what_and_why():
  text = kernels.explain(kernels.flash_attention, QUERY, QUERY, QUERY, is_causal=True)
  assert text.startswith(
    "flash_attention: pallas where lowered for TPU, else xla; laid out for v5e"
  )
  assert "MiB of vector memory" in text
  assert kernels.explain(kernels.rms_norm, X, SCALE).startswith("rms_norm: pallas where lowered")
  positions = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
  text = kernels.explain("rotary_embedding", QUERY, QUERY, positions, implementation="xla")
  assert text == "rotary_embedding: xla, on every platform (requested)"
  head = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
  text = kernels.explain(
    kernels.linear_cross_entropy, X, head, jax.ShapeDtypeStruct((4,), jnp.int32)
  )
  assert "xla, on every platform (this operation: it has no kernel" in text
  wide = jax.ShapeDtypeStruct((1, 8, 2, 512), jnp.bfloat16)
  text = kernels.explain("flash_attention", wide, wide, wide)
  assert "query: expected a head dim of at most 256, got 512" in text


def rms_norm(*_):
  """Has the same name as one of the operations."""


def test_mistakes_are_explained():
  with pytest.raises(ValueError, match="unknown TPU generation 'v9'; expected one of v4, v5e"):
    kernels.target("v9")
  with pytest.raises(ValueError, match="unknown operation 'softmax'; expected one of flash_att"):
    kernels.explain("softmax", X)
  # Functions are compared by identity, not by name.
  for other in (jax.nn.softmax, functools.partial(kernels.rms_norm), rms_norm):
    with pytest.raises(ValueError, match="unknown operation .* or the function"):
      kernels.explain(other, X, SCALE)
  with pytest.raises(NotImplementedError, match="implementation='cuda' does not exist"):
    kernels.rms_norm(jnp.ones((2, 4)), jnp.ones(4), implementation="cuda")
