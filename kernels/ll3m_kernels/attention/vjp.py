"""Attention as one differentiable operation, for both implementations, with or without a mesh."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ll3m_kernels import dispatch
from ll3m_kernels.attention import backward, forward, xla
from ll3m_kernels.attention.block_sizes import BlockSizes
from ll3m_kernels.attention.spec import Spec
from ll3m_kernels.sharding import Sharding, map_shards, own_part

OUTPUT_NAME = "flash_attention_output"
RESIDUAL_NAME = "flash_attention_log_sum_exp"
# The values that the backward pass reads besides the arguments. If they are saved
# (`jax.checkpoint_policies.save_only_these_names`), a remat does not run the forward pass again.
ATTENTION_RESIDUALS = (OUTPUT_NAME, RESIDUAL_NAME)


class Static(NamedTuple):
  """The static arguments of attention.

  Attributes:
    spec: Options of the call.
    block_sizes: Block sizes that the caller chose; None for the default ones.
    implementation: Return value of `dispatch.choose`.
    sharding: Placement of the arrays on a mesh; None on one device.
  """

  spec: Spec
  block_sizes: BlockSizes | None
  implementation: str | None
  sharding: Sharding | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
  static: Static,
  query: Array,
  key: Array,
  value: Array,
  query_ids: Array | None,
  key_ids: Array | None,
) -> tuple[Array, Array]:
  """Returns output [B, T, N, Hv] and log-sum-exp [B, N, T]; see `flash_attention`."""
  return _forward(static, query, key, value, query_ids, key_ids)[0]


def _forward(static, query, key, value, query_ids, key_ids):
  heads = Heads(static.sharding, query.shape[2], key.shape[2])

  def shard(query, key, value, query_ids, key_ids):
    return dispatch.run(
      static.implementation,
      functools.partial(forward.forward, static.spec, static.block_sizes),
      functools.partial(xla.forward, static.spec),
      query,
      heads.own(key),
      heads.own(value),
      query_ids,
      key_ids,
    )

  mapped = map_shards(
    shard,
    static.sharding,
    (heads.queries, heads.keys, heads.keys, heads.ids, heads.ids),
    (heads.queries, heads.rows),
  )
  arrays = (query, key, value, query_ids, key_ids)
  output, log_sum_exp = dispatch.first_order("flash_attention", mapped, *arrays)
  output = checkpoint_name(output, OUTPUT_NAME)
  log_sum_exp = checkpoint_name(log_sum_exp, RESIDUAL_NAME)
  return (output, log_sum_exp), (*arrays, output, log_sum_exp)


def _backward(static, residuals, cotangents):
  query, key = residuals[:2]
  heads = Heads(static.sharding, query.shape[2], key.shape[2])

  def shard(query, key, value, *rest):
    query_bar, key_bar, value_bar = dispatch.run(
      static.implementation,
      functools.partial(backward.backward, static.spec, static.block_sizes),
      functools.partial(xla.backward, static.spec),
      query,
      heads.own(key),
      heads.own(value),
      *rest,
    )
    return query_bar, heads.join(key_bar), heads.join(value_bar)

  mapped = map_shards(
    shard,
    static.sharding,
    (heads.queries, heads.keys, heads.keys, heads.ids, heads.ids, heads.queries, heads.rows)
    + (heads.queries, heads.rows),
    (heads.queries, heads.keys, heads.keys),
  )
  bars = dispatch.first_order("flash_attention", mapped, *residuals, *cotangents)
  return (*bars, None, None)


# An output that all rows of a vmap share has one cotangent, not one per row.
attention.defvjp(_forward, _backward, generic_batching=True)


class Heads:
  """The split of the heads over a mesh axis of m devices.

  Query heads are split if m divides N. KV heads are split if m divides K too. If instead K < m and
  K divides m, each device holds all KV heads and picks the one that its query heads attend to.
  Otherwise no heads are split, and all devices of the axis do the same work.
  """

  def __init__(self, sharding: Sharding | None, num_heads: int, num_kv_heads: int):
    self._sharding = sharding
    count = 1 if sharding is None else sharding.head_shards
    self._picks = num_heads % count == 0 and num_kv_heads < count and count % num_kv_heads == 0
    splits = num_heads % count == 0 and num_kv_heads % count == 0
    self._axis = None if sharding is None else sharding.head_axis
    self._num_kv_heads, self._devices_per_head = num_kv_heads, max(1, count // num_kv_heads)
    batch = None if sharding is None else sharding.batch_axes
    axis = self._axis if splits or self._picks else None
    self.queries = PartitionSpec(batch, None, axis, None)  # [B, T, N, H]
    self.keys = PartitionSpec(batch, None, axis if splits else None, None)  # [B, S, K, H]
    self.rows = PartitionSpec(batch, axis, None)  # [B, N, T]
    self.ids = PartitionSpec(batch, None)  # [B, T]

  def own_parts(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Returns the shapes of the query, key and value of one device."""
    query = own_part(self._sharding, query, self.queries)
    key, value = (own_part(self._sharding, x, self.keys) for x in (key, value))
    if self._picks:
      key, value = (
        jax.ShapeDtypeStruct((*x.shape[:2], 1, x.shape[3]), x.dtype) for x in (key, value)
      )
    return query, key, value

  def own(self, array: Array) -> Array:
    """Returns the KV heads that this device's query heads attend to."""
    if not self._picks:
      return array
    head = jax.lax.axis_index(self._axis) // self._devices_per_head
    return jax.lax.dynamic_slice_in_dim(array, head, 1, axis=2)

  def join(self, cotangent: Array) -> Array:
    """Transposes `own`: sums the cotangents of each KV head over the devices, in float32."""
    if not self._picks:
      return cotangent
    head = jax.lax.axis_index(self._axis) // self._devices_per_head
    shape = (*cotangent.shape[:2], self._num_kv_heads, cotangent.shape[3])
    whole = jax.lax.dynamic_update_slice_in_dim(
      jnp.zeros(shape, jnp.float32), cotangent.astype(jnp.float32), head, axis=2
    )
    return jax.lax.psum(whole, self._axis).astype(cotangent.dtype)
