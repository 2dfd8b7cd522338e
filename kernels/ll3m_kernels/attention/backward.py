"""The backward pass of attention on a TPU: one kernel for all three gradients.

With P the weights of a tile, computed again from the log-sum-exp, and dO the output's cotangent
(Dao, 2023):

    dV += P dO      dP = V dO^T      dS = P * (dP - delta)      dK += dS Q      dQ += dS^T K
    delta = sum(dO * O) - d(log-sum-exp)

Tiles are [keys, queries]: K is passed in both orientations, and the log-sum-exp and delta are rows,
as they are in HBM. Each tile is visited once: dQ of a block of queries is summed over its tiles,
and dK and dV stay in vector memory, in float32, for all query heads of their KV head. Where the
gradients of all keys do not fit, the kernel runs once per block_kv, and dQ is passed from call to
call in float32.

Within a tile, keys are processed in chunks (`backward_schedule`). In partial blocks whose diagonal
offset is static (see the glossary of `tile_schedule`), each chunk of keys is multiplied only by the
queries that see it.

Dimensions in the kernel: n keys and r queries of a chunk, H and Hv head dims of keys and values.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.attention import backward_schedule, masking, tile_schedule
from ll3m_kernels.attention import block_sizes as sizes
from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Ids, Layout, id_inputs
from ll3m_kernels.attention.masking import LOG2_E, dot
from ll3m_kernels.block_arithmetic import up, vmem_limit
from ll3m_kernels.dispatch import Generation
from ll3m_kernels.sharding import result


def backward(
  spec: specs.Spec,
  block_sizes: sizes.BlockSizes | None,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
  output: Float[Array, "B T N Hv"],
  log_sum_exp: Float[Array, "B N T"],
  output_bar: Float[Array, "B T N Hv"],
  log_sum_exp_bar: Float[Array, "B N T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
  """Computes the cotangents of query, key and value."""
  problem = sizes.problem_of(query, key, value, spec.span, query_ids is not None)
  blocks = sizes.choose_blocks(block_sizes, problem)
  delta = jnp.einsum("BTNH,BTNH->BNT", output_bar.astype(jnp.float32), output.astype(jnp.float32))
  # A log-sum-exp of 0 gives weight 0 to the masked scores of queries that see no key.
  log_sum_exp = jnp.where(log_sum_exp > 0.5 * specs.MASKED, log_sum_exp, 0.0)
  rows = [(log_sum_exp * LOG2_E)[:, :, None], (delta - log_sum_exp_bar)[:, :, None]]
  arrays = [
    query.transpose(0, 2, 3, 1),
    output_bar.transpose(0, 2, 3, 1),
    *rows,
    key.transpose(0, 2, 1, 3),
    key.transpose(0, 2, 3, 1),
    value.transpose(0, 2, 1, 3),
  ]
  num_keys = key.shape[1]
  _, seen_keys = specs.keys_seen_by_any(spec.span, 0, query.shape[1] - 1, num_keys)
  query_bar, key_bars, value_bars = None, [], []
  starts = range(0, seen_keys, blocks.block_kv_backward)
  for start in starts:
    query_bar, key_bar, value_bar = _block_kv_gradients(
      spec,
      problem,
      blocks,
      arrays,
      (query_ids, key_ids),
      start,
      seen_keys,
      query_bar,
      len(starts) > 1,
    )
    key_bars.append(key_bar)
    value_bars.append(value_bar)

  def join(parts):
    part = jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]  # [B, K, S, H]
    missing = num_keys - part.shape[2]
    return jnp.pad(part, ((0, 0), (0, 0), (0, missing), (0, 0))).transpose(0, 2, 1, 3)

  query_bar = query_bar[:, :, : query.shape[3], : query.shape[1]].transpose(0, 3, 1, 2)
  return query_bar.astype(query.dtype), join(key_bars), join(value_bars)


def _block_kv_gradients(
  spec, problem, blocks, arrays, ids, first_key, num_keys, query_bar, passes_on
):
  """Computes dK and dV of one block_kv, and adds its contribution to dQ.

  Args:
    spec: The options of the attention call.
    problem: The shapes of the attention call.
    blocks: The block sizes.
    arrays: The inputs of the kernel.
    ids: Segment ids of queries and keys, or None twice.
    first_key: Position of the first key of the block_kv.
    num_keys: Number of keys up to the last one that a query sees.
    query_bar: Sum of dQ over the preceding calls; None in the first call.
    passes_on: Whether dQ is passed from call to call, in float32.
  """
  query, output_bar, _, _, key, _, value = arrays
  batch, num_heads, head_dim, length = query.shape
  num_kv_heads, value_dim = value.shape[1], value.shape[3]
  group = num_heads // num_kv_heads
  generation = dispatch.generation()
  layout = Layout(
    length,
    num_keys,
    blocks.block_q_backward,
    blocks.block_kv_compute_backward,
    blocks.block_kv_backward,
    ids[0] is not None,
  )
  count = min(layout.block_kv, num_keys - first_key)
  kv_index = first_key // layout.block_kv
  # The first call visits all queries: those that see none of its keys need a gradient too.
  first_block, last_block = 0, pl.cdiv(length, layout.block_q)
  if query_bar is not None:
    low, high = specs.queries_seeing_any(spec.span, first_key, first_key + count - 1, length)
    first_block = min(low // layout.block_q, last_block - 1)
    last_block = max(pl.cdiv(high, layout.block_q), first_block + 1)

  # Whole registers: otherwise the profile of these products aborts on v5e and v5p. Rows beyond the
  # head hold arbitrary values, and contribute only to rows that are cut off.
  rows = sizes.rows(head_dim, query.dtype.itemsize)

  def q_spec(size):
    return pl.BlockSpec(
      (1, 1, size, layout.block_q), lambda b, k, g, i: (b, k * group + g, 0, i + first_block)
    )

  def kv_spec(size):
    return pl.BlockSpec((1, 1, layout.block_kv, size), lambda b, k, g, i: (b, k, kv_index, 0))

  def acc_scratch(size):
    shape = (layout.block_kv, size)
    return pltpu.VMEM(shape[::-1] if _is_narrow(size, generation) else shape, jnp.float32)

  in_specs = [
    q_spec(head_dim),
    q_spec(value_dim),
    q_spec(1),
    q_spec(1),
    kv_spec(head_dim),
    pl.BlockSpec((1, 1, rows, layout.block_kv), lambda b, k, g, i: (b, k, 0, kv_index)),
    kv_spec(value_dim),
  ]
  if layout.has_segments:
    id_arrays, id_specs = id_inputs(
      layout, *ids, lambda b, k, g, i: (b, i + first_block), lambda b, k, g, i: (b, kv_index)
    )
    arrays, in_specs = arrays + id_arrays, in_specs + id_specs
  aliases = {}
  if query_bar is not None:
    aliases = {len(arrays): 0}
    arrays, in_specs = [*arrays, query_bar], [*in_specs, q_spec(rows)]
  return pl.pallas_call(
    functools.partial(
      _kernel,
      spec,
      layout,
      generation,
      first_key,
      (first_block, last_block),
      group,
      query_bar is not None,
    ),
    grid=(batch, num_kv_heads, group, last_block - first_block),
    in_specs=in_specs,
    out_specs=[
      q_spec(rows),
      pl.BlockSpec((1, 1, layout.block_kv, head_dim), lambda b, k, g, i: (b, k, 0, 0)),
      pl.BlockSpec((1, 1, layout.block_kv, value_dim), lambda b, k, g, i: (b, k, 0, 0)),
    ],
    out_shape=[
      result(
        # Whole blocks: the interpreter does not crop an aliased array to its shape.
        (batch, num_heads, rows, up(length, layout.block_q)) if passes_on else query.shape,
        jnp.float32 if passes_on else query.dtype,
        query,
      ),
      result((batch, num_kv_heads, count, head_dim), key.dtype, query),
      result((batch, num_kv_heads, count, value_dim), value.dtype, query),
    ],
    scratch_shapes=[
      pltpu.VMEM((rows, layout.block_q), jnp.float32),
      acc_scratch(head_dim),
      acc_scratch(value_dim),
    ],
    input_output_aliases=aliases,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem_limit(sizes.backward_bytes(problem, blocks, generation), generation),
    ),
    name="flash_attention_backward",
  )(*arrays)


def _kernel(spec, layout, generation, first_key, query_blocks, group, has_dq_input, *refs):
  first_block, last_block = query_blocks
  query_ref, output_bar_ref, lse_ref, delta_ref, key_ref, key_columns_ref, value_ref = refs[:7]
  refs = refs[7:]
  ids, refs = (Ids(*refs[:4]), refs[4:]) if layout.has_segments else (None, refs)
  query_bar_in_ref, refs = (refs[0], refs[1:]) if has_dq_input else (None, refs)
  query_bar_ref, key_bar_ref, value_bar_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref = refs
  g, i = pl.program_id(2), pl.program_id(3) + first_block

  @pl.when((g == 0) & (i == first_block))
  def _():
    dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
    dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

  dq_acc_ref[...] = query_bar_in_ref[0, 0] if has_dq_input else jnp.zeros_like(dq_acc_ref)
  queries = [ref[0, 0] for ref in (query_ref, output_bar_ref, lse_ref, delta_ref)]
  if layout.num_queries % layout.block_q:
    # Zeroed, queries beyond the end contribute nothing to any gradient.
    remaining = layout.num_queries - i * layout.block_q
    queries = [masking.zero_beyond(array, 1, remaining) for array in queries]
  query, output_bar, log_sum_exp, delta = queries  # [H, Hv, 1 or 1, block_q]

  def add_product(acc_ref: Any, keys: Any, tile: Array, columns: Array) -> None:
    if _is_narrow(columns.shape[0], generation):
      acc_ref[:, keys] += dot(columns, tile, (1, 1))
    else:
      acc_ref[keys, :] += dot(tile, columns, (1, 1))

  def add(chunk: backward_schedule.Chunk, may_overrun: bool) -> None:
    keys, values = key_ref[0, 0, chunk.keys, :], value_ref[0, 0, chunk.keys, :]  # [n, H or Hv]
    key_columns = key_columns_ref[0, 0, :, chunk.keys]  # [H, n]
    remaining = None
    if may_overrun:
      remaining = layout.num_keys - first_key - chunk.first_key
      keys = masking.zero_beyond(keys, 0, remaining)
      values = masking.zero_beyond(values, 0, remaining)
      key_columns = masking.zero_beyond(key_columns, 1, remaining)
    rows = chunk.queries
    scores, slope = masking.scale(spec, dot(keys, query[:, rows]))  # [n, r]
    id_pair = None
    if ids is not None:
      id_pair = (ids.queries[0, :, rows], masking.column(ids.keys[0, :, chunk.keys])[:, :1])
    scores = masking.mask(spec, scores, 0, count=remaining, ids=id_pair)
    if chunk.diagonal_offset is not None:
      scores = masking.mask_edges(spec, scores, 0, chunk.diagonal_offset, chunk.full)
    weights = jnp.exp2(scores - log_sum_exp[:, rows])
    scores_bar = weights * (dot(values, output_bar[:, rows]) - delta[:, rows]) * spec.scale
    if slope is not None:
      scores_bar = scores_bar * slope
    weights, scores_bar = weights.astype(query.dtype), scores_bar.astype(query.dtype)
    add_product(dv_acc_ref, chunk.keys, weights, output_bar[:, rows])
    add_product(dk_acc_ref, chunk.keys, scores_bar, query[:, rows])
    dq_acc_ref[:, rows] += dot(key_columns, scores_bar)

  def add_tile(tile: Any, diagonal_offset: Any, may_overrun: bool, _: tile_schedule.Ends) -> None:
    for chunk in backward_schedule.tile_chunks(layout, tile, diagonal_offset):
      add(chunk, may_overrun)

  def add_partial_blocks(
    partial_blocks: Sequence[tuple[Any, int]], may_overrun: bool, _: tile_schedule.Ends
  ) -> None:
    for tile, offset in partial_blocks:
      for chunk in backward_schedule.partial_block_chunks(spec, layout, tile, offset, generation):
        add(chunk, may_overrun)

  tile_schedule.for_each_tile(spec, layout, i, first_key, ids, add_tile, add_partial_blocks)
  query_bar_ref[0, 0] = dq_acc_ref[...].astype(query_bar_ref.dtype)

  @pl.when((g == group - 1) & (i == last_block - 1))
  def _():
    for bar_ref, acc_ref in ((key_bar_ref, dk_acc_ref), (value_bar_ref, dv_acc_ref)):
      acc = acc_ref[...]
      acc = acc.T if _is_narrow(bar_ref.shape[3], generation) else acc
      bar_ref[0, 0] = acc.astype(bar_ref.dtype)


def _is_narrow(size: int, generation: Generation) -> bool:
  """Returns whether a head of this size leaves columns of the matrix unit empty.

  Its dK or dV is then accumulated as [size, keys]: the right side of a product fills the columns.
  Head dim 64 takes 0.81 of the cycles (v5e), 128 takes 0.89 (v6e); 256 takes 1.03 (v6e).
  """
  return size < generation.matrix_unit
