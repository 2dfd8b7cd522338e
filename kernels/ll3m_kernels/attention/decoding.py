"""The forward pass on a TPU for few queries and many keys, as in decoding.

Its time is that of fetching keys and values, so each is fetched once: all G query heads of a KV
head become the R = G * T rows of one matrix. (`forward` would fetch keys once per query head, and
use one row of a tile.) Keys and values are read as a cache holds them, [B, K, S, H]. Scores are
[R, block_kv]; a grid step has one block_kv of keys. See the glossary of `tile_schedule`.
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
_MAX_ROWS = 128
# Keys and values of one grid step; those of two grid steps are in memory at a time.
_BLOCK_BYTES = 2 * MIB
_VMEM_BYTES = 16 * MIB


def serves(span: specs.Span, query: Any, key: Any) -> bool:
  """Returns whether this kernel serves queries [B, T, N, H] and keys [B, S, K, H].

  It serves at most 128 rows (T * N / K) of queries, and no mask by position.
  """
  return span == specs.Span(None, None) and _rows(query, key) <= _MAX_ROWS


def describe(query: Any, key: Any, value: Any) -> tuple[str, int]:
  """Returns a description of the block sizes, and the vector memory that they need, in bytes."""
  rows, block_kv = _rows(query, key), block_kv_of(key, value)
  text = f"{rows} rows of queries x {block_kv} keys, for few queries"
  return text, 2 * block_kv * _bytes_per_key(key, value) + 3 * 4 * rows * block_kv


def block_kv_of(key: Any, value: Any) -> int:
  """Returns the number of keys of a grid step, for keys [B, S, K, H]: all, or a multiple of 128."""
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
  rows, block_kv = group * length, block_kv_of(key, value)
  count = pl.cdiv(num_keys, block_kv)
  # [B, K, R, H], with the queries of one head adjacent.
  folded = query.reshape(batch, length, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)

  def row_spec(size):
    return pl.BlockSpec((1, 1, rows, size), lambda b, k, j: (b, k, 0, 0))

  def kv_spec(size):
    return pl.BlockSpec((1, 1, block_kv, size), lambda b, k, j: (b, k, j, 0))

  arrays = [
    folded.reshape(batch, num_kv_heads, rows, head_dim),
    key.swapaxes(1, 2),
    value.swapaxes(1, 2),
  ]
  in_specs = [row_spec(head_dim), kv_spec(head_dim), kv_spec(value_dim)]
  if query_ids is not None:
    ids = jnp.tile(query_ids.astype(jnp.int32), (1, group))
    key_ranges = specs.block_ranges(key_ids, block_kv)
    query_ranges = specs.block_ranges(ids, rows)
    arrays += [ids[:, :, None], key_ids[:, None].astype(jnp.int32), query_ranges, key_ranges]
    in_specs += [
      pl.BlockSpec((1, rows, 1), lambda b, k, j: (b, 0, 0)),
      pl.BlockSpec((1, 1, block_kv), lambda b, k, j: (b, 0, j)),
      ranges_spec(query_ranges),
      ranges_spec(key_ranges),
    ]
  output, log_sum_exp = pl.pallas_call(
    functools.partial(_kernel, spec, num_keys, block_kv, count, query_ids is not None),
    grid=(batch, num_kv_heads, count),
    in_specs=in_specs,
    out_specs=[row_spec(value_dim), row_spec(1)],
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


def _kernel(spec, num_keys, block_kv, count, has_segments, query_ref, key_ref, value_ref, *refs):
  ids, refs = (refs[:4], refs[4:]) if has_segments else (None, refs)
  output_ref, log_sum_exp_ref, acc_ref, m_ref, l_ref = refs
  j = pl.program_id(2)

  @pl.when(j == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    # Above MASKED, so that the weights of masked scores are 0 even where all scores are masked.
    m_ref[...] = jnp.full_like(m_ref, 0.5 * specs.MASKED)
    l_ref[...] = jnp.zeros_like(l_ref)

  def add_block():
    values = value_ref[0, 0]  # [block_kv, Hv]
    scores, _ = masking.scale(spec, dot(query_ref[0, 0], key_ref[0, 0], (1, 1)))  # [R, block_kv]
    if num_keys % block_kv:
      remaining = num_keys - j * block_kv
      key_index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
      scores = jnp.where(key_index < remaining, scores, specs.MASKED)
      values = masking.zero_beyond(values, 0, remaining)
    if ids is not None:
      scores = jnp.where(ids[0][0] == ids[1][0], scores, specs.MASKED)
    m_prev = m_ref[...]  # [R, 1]
    m_next = jnp.maximum(m_prev, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - m_next)  # [R, block_kv]
    alpha = jnp.exp2(m_prev - m_next)
    m_ref[...] = m_next
    l_ref[...] = alpha * l_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
    acc_ref[...] = alpha * acc_ref[...] + dot(weights.astype(values.dtype), values)  # [R, Hv]

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
    l = l_ref[...]
    is_empty = l == 0.0
    l = jnp.where(is_empty, 1.0, l)
    output_ref[0, 0] = (acc_ref[...] / l).astype(output_ref.dtype)
    log_sum_exp = m_ref[...] * _LOG_2 + jnp.log(l)
    log_sum_exp_ref[0, 0] = jnp.where(is_empty, specs.MASKED, log_sum_exp)
