"""Rotary embeddings in float64 NumPy, and comparisons of both implementations with them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from ll3m_kernels import Sharding, rotary_embedding
from tests.kernels import numpy_kernels
from tests.kernels.tolerances import assert_close

IMPLEMENTATIONS = ["xla", "pallas"]
LAST = 2**20 - 1


OF_ORACLE = ("theta", "rotary_dim", "scaling_factor", "inverse_frequencies", "magnitude")


def oracle(
  x,
  positions,
  theta=1e4,
  rotary_dim=None,
  scaling_factor=1.0,
  inverse_frequencies=None,
  magnitude=1.0,
  sign=1,
):
  """Rotates [B, T, heads, H] in float64; sign=-1 rotates backwards."""
  x = np.asarray(x, np.float64)
  size = x.shape[-1] if rotary_dim is None else rotary_dim
  frequencies = (1.0 / theta ** (np.arange(0, size, 2) / size)).astype(np.float32)
  frequencies /= np.float32(scaling_factor)
  if inverse_frequencies is not None:
    frequencies = np.float32(inverse_frequencies)
  angles = np.asarray(positions, np.float64)[..., None, None] * frequencies.astype(np.float64)
  cos, sin = magnitude * np.cos(angles), magnitude * sign * np.sin(angles)
  first, second = x[..., : size // 2], x[..., size // 2 : size]
  return np.concatenate(
    [first * cos - second * sin, second * cos + first * sin, x[..., size:]], axis=-1
  )


def draw(batch, length, heads, size, dtype=jnp.float32, most=4096, seed=0):
  """Returns query, key, their cotangents, and unsorted positions that may repeat."""
  rng = np.random.default_rng(seed)
  arrays = [jnp.asarray(rng.normal(size=(batch, length, n, size)), dtype) for n in (*heads, *heads)]
  return arrays, jnp.asarray(rng.integers(0, most + 1, (batch, length)), jnp.int32)


def rotate_and_back(implementation, arrays, positions, races=False, **options):
  """Returns the rotated query and key, and their gradients for the cotangents."""
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
  on_tpu = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
  with on_tpu if races else numpy_kernels.interpreted():
    return jax.jit(run)(query, key, *cotangents)


def check(arrays, positions, implementations=IMPLEMENTATIONS, **options):
  """Compares values and gradients of the implementations with the oracle."""
  dtype = arrays[0].dtype
  of_oracle = {k: v for k, v in options.items() if k in OF_ORACLE}
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


def loss(query, key, positions, **options):
  """Returns a scalar that is nonlinear in query and key, so that it has second derivatives."""
  query, key = rotary_embedding(query, key, positions, **options)
  return jnp.sum(jnp.sin(query) ** 2) + jnp.sum(query[:, :, :1] * key[:, :, :1] ** 2)


def sharding_of(*sizes):
  mesh = jax.make_mesh(sizes, ("dp", "fsdp", "mp"), axis_types=(AxisType.Auto,) * 3)
  return Sharding(mesh)
