"""The forward pass of attention on a TPU (Dao, 2023, FlashAttention-2).

Scores are held transposed, [keys, queries]: softmax then reduces over sublanes, its statistics are
rows [1, queries] that lie in memory as compactly as the log-sum-exp is returned, and both products
are plain ones. Queries, values and outputs come with tokens last, [.., H, T], so that nothing is
transposed in the kernel, and a head dim that is no multiple of 128 wastes no lanes.

A grid step has a block of queries of one head and the resident keys of its KV head. It walks these
in tiles, and knows from its place in the grid which of them the mask cuts, which it leaves whole
and which no query sees; tiles of other segments are skipped by the ranges of their ids.
"""

import functools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ll3m_kernels.attention import blocks as sizes
from ll3m_kernels.attention import decoding, tiles
from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.tiles import dot
from ll3m_kernels.sharding import result

_LOG_2 = math.log(2.0)


def forward(
  spec: specs.Spec,
  block_sizes: sizes.BlockSizes | None,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Computes attention and its log-sum-exp; see `flash_attention`."""
  if block_sizes is None and decoding.serves(spec.span, query, key):
    return decoding.forward(spec, query, key, value, query_ids, key_ids)
  batch, length, num_heads, head_dim = query.shape
  num_keys, num_kv_heads, value_dim = value.shape[1:]
  group = num_heads // num_kv_heads
  problem = sizes.problem_of(query, key, value, query_ids is not None)
  blocks = sizes.choose_blocks(block_sizes, problem)
  # What no query sees is not even fetched.
  _, num_keys = specs.some_see(spec.span, 0, length - 1, num_keys)
  layout = tiles.Layout(
    length, num_keys, blocks.queries, blocks.keys, blocks.keys_resident, query_ids is not None
  )
  query_blocks = pl.cdiv(length, layout.queries)
  key_blocks = pl.cdiv(num_keys, layout.resident)

  def key_block(i, j):
    """The block of resident keys to fetch: none that the queries do not see."""
    if key_blocks == 1:
      return 0
    first = i * layout.queries
    last = specs.minimum(first + layout.queries, length) - 1
    low, high = specs.some_see(spec.span, first, last, num_keys)
    least, most = (
      specs.divide(low, layout.resident),
      specs.divide(specs.maximum(high - 1, 0), layout.resident),
    )
    return specs.minimum(specs.maximum(j, least), specs.maximum(most, least))

  def of_queries(size):
    return pl.BlockSpec((1, 1, size, layout.queries), lambda b, n, i, j: (b, n, 0, i))

  in_specs = [
    of_queries(head_dim),
    pl.BlockSpec(
      (1, 1, layout.resident, head_dim),
      lambda b, n, i, j: (b, specs.divide(n, group), key_block(i, j), 0),
    ),
    pl.BlockSpec(
      (1, 1, value_dim, layout.resident),
      lambda b, n, i, j: (b, specs.divide(n, group), 0, key_block(i, j)),
    ),
  ]
  arrays = [
    query.transpose(0, 2, 3, 1), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 3, 1)
  ]  # fmt: skip
  if layout.has_segments:
    id_arrays, id_specs = tiles.id_inputs(
      layout, query_ids, key_ids, lambda b, n, i, j: (b, i), lambda b, n, i, j: (b, key_block(i, j))
    )
    arrays, in_specs = arrays + id_arrays, in_specs + id_specs
  output, log_sum_exp = pl.pallas_call(
    functools.partial(_kernel, spec, layout, key_blocks),
    grid=(batch, num_heads, query_blocks, key_blocks),
    in_specs=in_specs,
    out_specs=[of_queries(value_dim), of_queries(1)],
    out_shape=[
      result((batch, num_heads, value_dim, length), query.dtype, query),
      result((batch, num_heads, 1, length), jnp.float32, query),
    ],
    scratch_shapes=[
      pltpu.VMEM((value_dim, layout.queries), jnp.float32),
      pltpu.VMEM((1, layout.queries), jnp.float32),
      pltpu.VMEM((1, layout.queries), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=sizes.vmem_limit(sizes.forward_bytes(problem, blocks)),
    ),
    name="flash_attention_forward",
  )(*arrays)
  return output.transpose(0, 3, 1, 2), log_sum_exp[:, :, 0]


def _kernel(spec, layout, key_blocks, query_ref, key_ref, value_ref, *refs):
  ids, refs = (tiles.Ids(*refs[:4]), refs[4:]) if layout.has_segments else (None, refs)
  output_ref, log_sum_exp_ref, sum_ref, largest_ref, total_ref = refs
  i, j = pl.program_id(2), pl.program_id(3)
  first_key = j * layout.resident if key_blocks > 1 else 0

  @pl.when(j == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)
    # Never as low as what is masked, so that this vanishes even where nothing is visible.
    largest_ref[...] = jnp.full_like(largest_ref, 0.5 * specs.MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)

  def add_tile(tile, is_masked):
    query = query_ref[0, 0]
    chunks = tiles.chunks_of(layout, tile)
    products = [tiles.scale(spec, dot(key_ref[0, 0, chunk.index, :], query))[0] for chunk in chunks]
    largest, total, weighted = largest_ref[...], total_ref[...], sum_ref[...]
    for chunk, chunk_scores in zip(chunks, products, strict=True):
      values = value_ref[0, 0, :, chunk.index]
      if is_masked:
        seen = tiles.mask(spec, layout, i, first_key, chunk, ids)
        if seen is not None:
          chunk_scores = jnp.where(seen, chunk_scores, specs.MASKED)
        if layout.num_keys % layout.keys:
          values = tiles.existing(values, 1, layout.num_keys - first_key - chunk.offset)
      before = largest
      largest = jnp.maximum(before, jnp.max(chunk_scores, axis=0, keepdims=True))
      weights = jnp.exp2(chunk_scores - largest)  # [keys, queries]
      shrink = jnp.exp2(before - largest)
      total = shrink * total + jnp.sum(weights, axis=0, keepdims=True)
      weighted = shrink * weighted + dot(values, weights.astype(values.dtype))
    largest_ref[...], total_ref[...], sum_ref[...] = largest, total, weighted

  tiles.for_each_tile(spec, layout, i, first_key, ids, add_tile)

  @pl.when(j == key_blocks - 1)
  def _():
    total = total_ref[...]
    is_empty = total == 0.0
    total = jnp.where(is_empty, 1.0, total)
    output_ref[0, 0] = (sum_ref[...] * (1.0 / total)).astype(output_ref.dtype)
    log_sum_exp = largest_ref[...] * _LOG_2 + jnp.log(total)
    log_sum_exp_ref[0, 0] = jnp.where(is_empty, specs.MASKED, log_sum_exp)
