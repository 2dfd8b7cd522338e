"""The forward pass for a few queries against many keys, as in decoding, on a TPU.

It takes as long as keys and values take to arrive, so each of them is fetched once: the query heads
of a KV head become rows of one matrix, R = G * T of them. (`forward` would fetch keys again for
each of the heads, and fill a tile with one query.) Keys and values are read as a cache holds them,
[B, K, S, H]. Scores are [R, keys]; a grid step has a block of keys.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ll3m_kernels.attention import masking
from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import ranges_spec
from ll3m_kernels.attention.masking import dot
from ll3m_kernels.block_arithmetic import LANES, even, up
from ll3m_kernels.dispatch import MIB
from ll3m_kernels.sharding import result

_LOG_2 = math.log(2.0)
_MOST_ROWS = 128
# Of keys and values in one grid step, of which two are in memory at a time.
_BLOCK_BYTES = 2 * MIB
_VMEM_BYTES = 16 * MIB


def serves(span: specs.Span, query: Any, key: Any) -> bool:
  """Whether queries [B, T, N, H] are few enough for [B, S, K, H], and nothing masks by position."""
  return span == specs.Span(None, None) and _rows(query, key) <= _MOST_ROWS


def describe(query: Any, key: Any, value: Any) -> tuple[str, int]:
  """Returns in words how the kernel is cut, and the vector memory that takes, in bytes."""
  rows, block = _rows(query, key), keys_of_a_block(key, value)
  text = f"{rows} rows of queries x {block} keys, for few queries"
  return text, 2 * block * _bytes_per_key(key, value) + 3 * 4 * rows * block


def keys_of_a_block(key: Any, value: Any) -> int:
  """Returns how many keys [B, S, K, H] a grid step has: all, or a multiple of 128."""
  return even(key.shape[1], _BLOCK_BYTES // _bytes_per_key(key, value) // LANES * LANES)


def _rows(query, key) -> int:
  return query.shape[1] * query.shape[2] // key.shape[2]


def _bytes_per_key(key, value) -> int:
  return sum(up(x.shape[3], LANES) * jnp.dtype(x.dtype).itemsize for x in (key, value))


def forward(
  spec: specs.Spec,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Computes attention and its log-sum-exp; see `flash_attention`."""
  batch, length, num_heads, head_dim = query.shape
  num_keys, num_kv_heads, value_dim = value.shape[1:]
  group = num_heads // num_kv_heads
  rows, block = group * length, keys_of_a_block(key, value)
  count = pl.cdiv(num_keys, block)
  # [B, K, R, H], the queries of one head together.
  folded = query.reshape(batch, length, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)

  def of_rows(size):
    return pl.BlockSpec((1, 1, rows, size), lambda b, k, j: (b, k, 0, 0))

  def of_keys(size):
    return pl.BlockSpec((1, 1, block, size), lambda b, k, j: (b, k, j, 0))

  arrays = [
    folded.reshape(batch, num_kv_heads, rows, head_dim),
    key.swapaxes(1, 2),
    value.swapaxes(1, 2),
  ]
  in_specs = [of_rows(head_dim), of_keys(head_dim), of_keys(value_dim)]
  if query_ids is not None:
    ids = jnp.tile(query_ids.astype(jnp.int32), (1, group))
    key_ranges = specs.block_ranges(key_ids, block)

    query_ranges = specs.block_ranges(ids, rows)
    arrays += [ids[:, :, None], key_ids[:, None].astype(jnp.int32), query_ranges, key_ranges]
    in_specs += [
      pl.BlockSpec((1, rows, 1), lambda b, k, j: (b, 0, 0)),
      pl.BlockSpec((1, 1, block), lambda b, k, j: (b, 0, j)),
      ranges_spec(query_ranges),
      ranges_spec(key_ranges),
    ]
  output, log_sum_exp = pl.pallas_call(
    functools.partial(_kernel, spec, num_keys, block, count, query_ids is not None),
    grid=(batch, num_kv_heads, count),
    in_specs=in_specs,
    out_specs=[of_rows(value_dim), of_rows(1)],
    out_shape=[
      result((batch, num_kv_heads, rows, value_dim), query.dtype, query),
      result((batch, num_kv_heads, rows, 1), jnp.float32, query),
    ],
    scratch_shapes=[pltpu.VMEM((rows, size), jnp.float32) for size in (value_dim, 1, 1)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    ),
    name="flash_attention_decoding",
  )(*arrays)
  output = output.reshape(batch, num_kv_heads, group, length, value_dim).transpose(0, 3, 1, 2, 4)
  return (
    output.reshape(batch, length, num_heads, value_dim),
    log_sum_exp.reshape(batch, num_heads, length),
  )


def _kernel(spec, num_keys, block, count, has_segments, query_ref, key_ref, value_ref, *refs):
  ids, refs = (refs[:4], refs[4:]) if has_segments else (None, refs)
  output_ref, log_sum_exp_ref, sum_ref, largest_ref, total_ref = refs
  j = pl.program_id(2)

  @pl.when(j == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)
    # Never as low as what is masked, so that this vanishes even where nothing is visible.
    largest_ref[...] = jnp.full_like(largest_ref, 0.5 * specs.MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)

  def add_block():
    values = value_ref[0, 0]
    scores, _ = masking.scale(spec, dot(query_ref[0, 0], key_ref[0, 0], (1, 1)))  # [R, keys]
    if num_keys % block:
      left = num_keys - j * block
      key_index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
      scores = jnp.where(key_index < left, scores, specs.MASKED)
      values = masking.existing(values, 0, left)
    if ids is not None:
      scores = jnp.where(ids[0][0] == ids[1][0], scores, specs.MASKED)
    before = largest_ref[...]
    largest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - largest)
    shrink = jnp.exp2(before - largest)
    largest_ref[...] = largest
    total_ref[...] = shrink * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
    sum_ref[...] = shrink * sum_ref[...] + dot(weights.astype(values.dtype), values)

  if ids is None:
    add_block()
  else:
    query_ranges, key_ranges = ids[2:]
    pl.when(
      (key_ranges[0, 0, j] <= query_ranges[0, 1, 0])
      & (key_ranges[0, 1, j] >= query_ranges[0, 0, 0])
    )(add_block)

  @pl.when(j == count - 1)
  def _():
    total = total_ref[...]
    is_empty = total == 0.0
    total = jnp.where(is_empty, 1.0, total)
    output_ref[0, 0] = (sum_ref[...] / total).astype(output_ref.dtype)
    log_sum_exp = largest_ref[...] * _LOG_2 + jnp.log(total)
    log_sum_exp_ref[0, 0] = jnp.where(is_empty, specs.MASKED, log_sum_exp)
