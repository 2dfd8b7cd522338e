"""The public rotary embedding: checks its arguments and chooses an implementation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.rotary import kernel, xla
from ll3m_kernels.rotary.angles import Rotation
from ll3m_kernels.sharding import Sharding, map_shards, vary_alike


def rotary_embedding(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  positions: Int[Array, "B T"],
  *,
  theta: float = 10_000.0,
  rotary_dim: int | None = None,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
  """Rotates queries and keys by their positions (Su et al., 2021).

  The pair (x[i], x[i + R/2]), i < R/2, turns by positions * theta**(-2i/R), with R = rotary_dim;
  the dimensions from R on pass unchanged. The inverse frequencies are rounded to float32, as in
  every published implementation; their products with the positions are not: cos and sin are within
  2e-5 up to position 4,096, and within 2e-3 up to 2**20.

  Args:
    query: the queries.
    key: the keys.
    positions: each token's position, at least 0 and below 2**31.
    theta: base of the frequencies.
    rotary_dim: R, even; the whole head by default.
    implementation: see `dispatch.resolve`. The kernel serves bfloat16 and float32.
    sharding: how the arrays lie on a mesh: batch and heads may be split.

  Returns:
    The rotated queries and keys, in their own dtypes; the rotation is done in float32.

  Raises:
    ValueError: shapes, dtypes or a rotary_dim that do not fit.
    NotImplementedError: the named implementation cannot serve an argument, or this is
      differentiated twice.
  """
  rotary_dim = _check(query, key, positions, theta, rotary_dim)
  chosen = dispatch.choose(implementation, _refusal(query, key))
  if sharding is not None:
    sharding.check_batch("query", query.shape)
  static = _Static(Rotation(float(theta), rotary_dim), chosen, sharding)
  return _rotate(static, *vary_alike(query, key, positions.astype(jnp.int32)))


def explain(
  query: Any,
  key: Any,
  positions: Any,
  *,
  theta: float = 10_000.0,
  rotary_dim: int | None = None,
  implementation: str | None = None,
  **_: Any,
) -> str:
  """Says what `rotary_embedding` would run for these arguments."""
  rotary_dim = _check(query, key, positions, theta, rotary_dim)
  refusal = _refusal(query, key)
  kernels = {}
  if refusal is None:
    blocks = kernel.choose_blocks(query, key)
    kernels["either way"] = (
      f"blocks of {blocks.tokens} tokens of {blocks.query_heads} query and {blocks.key_heads} key "
      "heads",
      kernel.vmem_bytes(Rotation(float(theta), rotary_dim), query, key, blocks),
    )
  return dispatch.describe("rotary_embedding", implementation, refusal, kernels)


class _Static(NamedTuple):
  """What does not change with the data.

  Attributes:
    rotation: the options of the call.
    implementation: as `dispatch.choose` returns it.
    sharding: of the arrays; None on one device.
  """

  rotation: Rotation
  implementation: str | None
  sharding: Sharding | None

  def run(self, rotation: Rotation, query: Array, key: Array, positions: Array) -> Any:
    """Turns queries and keys, on one device or on every device's own part."""
    specs = [self._spec(query), self._spec(key)]
    batch = None if self.sharding is None else self.sharding.batch_axes
    function = functools.partial(
      dispatch.run,
      self.implementation,
      functools.partial(kernel.rotate, rotation),
      functools.partial(xla.rotate, rotation),
    )
    mapped = map_shards(function, self.sharding, (*specs, PartitionSpec(batch, None)), tuple(specs))
    return mapped(query, key, positions)

  def _spec(self, x: Array) -> PartitionSpec | None:
    """Heads are split where they divide, as in attention."""
    if self.sharding is None:
      return None
    splits = x.shape[2] % self.sharding.head_shards == 0
    axis = self.sharding.head_axis if splits else None
    return PartitionSpec(self.sharding.batch_axes, None, axis, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(static, query, key, positions):
  return _forward(static, query, key, positions)[0]


def _forward(static, query, key, positions):
  run = functools.partial(static.run, static.rotation)
  return dispatch.first_order("rotary_embedding", run, query, key, positions), positions


def _backward(static, positions, cotangents):
  # A rotation's transpose is its inverse.
  run = functools.partial(static.run, static.rotation.inverse())
  return *dispatch.first_order("rotary_embedding", run, *cotangents, positions), None


_rotate.defvjp(_forward, _backward)


def _check(query: Any, key: Any, positions: Any, theta: float, rotary_dim: int | None) -> int:
  """Checks the arguments and returns R."""
  if len(query.shape) != 4 or len(key.shape) != 4 or key.shape[:2] != query.shape[:2]:
    raise ValueError(
      f"query and key must be [B, T, heads, H] with one B and T, got {query.shape} and {key.shape}"
    )
  for name, array in (("query", query), ("key", key)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating, got {array.dtype}")
  head_dim = query.shape[-1]
  if key.shape[-1] != head_dim:
    raise ValueError(f"query and key must have one head dim, got {head_dim} and {key.shape[-1]}")
  if positions.shape != query.shape[:2]:
    raise ValueError(f"positions must have shape {query.shape[:2]}, got {positions.shape}")
  if not jnp.issubdtype(positions.dtype, jnp.integer):
    raise ValueError(f"positions must be integers, got {positions.dtype}")
  rotary_dim = head_dim if rotary_dim is None else rotary_dim
  if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
    raise ValueError(f"rotary_dim must be even and within 2..{head_dim}, got {rotary_dim}")
  if not theta > 0:
    raise ValueError(f"theta must be positive, got {theta}")
  return rotary_dim


def _refusal(query: Any, key: Any) -> str | None:
  """Says why the kernel cannot serve these arrays, if so."""
  for name, array in (("query", query), ("key", key)):
    if array.dtype not in (jnp.bfloat16, jnp.float32):
      return f"{name}: expected bfloat16 or float32, got {array.dtype}"
    if 0 in array.shape:
      return f"{name}: it is empty, {array.shape}"
  return None
