"""The backward pass of attention on a TPU: one kernel for all three gradients.

With P the weights of a tile, computed again from the log-sum-exp, and dO the output's cotangent
(Dao, 2023):

    dV += P dO      dP = V dO^T      dS = P * (dP - delta)      dK += dS Q      dQ += dS^T K
    delta = sum(dO * O) - d(log-sum-exp)

Tiles are [keys, queries]: K comes twice, in both orientations, and the log-sum-exp and delta are
rows, as they lie in memory. Each tile is visited once: dQ of a block of queries is summed over its
tiles, and dK and dV stay in memory, in float32, for all query heads of their KV head. Keys whose
gradients do not fit are taken in parts, by one call each; dQ then goes from call to call in
float32.

Within a tile, keys are processed in chunks (`backward_schedule`). On partially masked tiles the
mask's offset is static (`tile_schedule.cuts`), and each chunk of keys is multiplied only by the
queries that see it.
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
  # What is masked gives weights of 0 also to queries that see nothing.
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
  _, seen_keys = specs.some_see(spec.span, 0, query.shape[1] - 1, num_keys)
  query_bar, key_bars, value_bars = None, [], []
  starts = range(0, seen_keys, blocks.keys_resident_backward)
  for start in starts:
    query_bar, key_bar, value_bar = _part(
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


def _part(spec, problem, blocks, arrays, ids, first_key, num_keys, query_bar, passes_on):
  """Computes dK and dV of some keys, and adds what these give to dQ, which may be passed on."""
  query, output_bar, _, _, key, _, value = arrays
  batch, num_heads, head_dim, length = query.shape
  num_kv_heads, value_dim = value.shape[1], value.shape[3]
  group = num_heads // num_kv_heads
  generation = dispatch.generation()
  layout = Layout(
    length,
    num_keys,
    blocks.queries_backward,
    blocks.keys_backward,
    blocks.keys_resident_backward,
    ids[0] is not None,
  )
  count = min(layout.resident, num_keys - first_key)
  part = first_key // layout.resident
  # The first part visits all queries: also those that see none of its keys need a gradient.
  first_block, last_block = 0, pl.cdiv(length, layout.queries)
  if query_bar is not None:
    low, high = specs.queries_seeing(spec.span, first_key, first_key + count - 1, length)
    first_block = min(low // layout.queries, last_block - 1)
    last_block = max(pl.cdiv(high, layout.queries), first_block + 1)

  # Where such blocks reach beyond the heads, they hold anything, and give only what is cut off.
  # Else the profile of these products aborts on v5e and v5p.
  rows = sizes.rows(head_dim, query.dtype.itemsize)

  def of_queries(size):
    return pl.BlockSpec(
      (1, 1, size, layout.queries), lambda b, k, g, i: (b, k * group + g, 0, i + first_block)
    )

  def of_keys(size):
    return pl.BlockSpec((1, 1, layout.resident, size), lambda b, k, g, i: (b, k, part, 0))

  def sum_of(size):
    shape = (layout.resident, size)
    return pltpu.VMEM(shape[::-1] if _is_narrow(size, generation) else shape, jnp.float32)

  in_specs = [
    of_queries(head_dim),
    of_queries(value_dim),
    of_queries(1),
    of_queries(1),
    of_keys(head_dim),
    pl.BlockSpec((1, 1, rows, layout.resident), lambda b, k, g, i: (b, k, 0, part)),
    of_keys(value_dim),
  ]
  if layout.has_segments:
    id_arrays, id_specs = id_inputs(
      layout, *ids, lambda b, k, g, i: (b, i + first_block), lambda b, k, g, i: (b, part)
    )
    arrays, in_specs = arrays + id_arrays, in_specs + id_specs
  aliases = {}
  if query_bar is not None:
    aliases = {len(arrays): 0}
    arrays, in_specs = [*arrays, query_bar], [*in_specs, of_queries(rows)]
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
      of_queries(rows),
      pl.BlockSpec((1, 1, layout.resident, head_dim), lambda b, k, g, i: (b, k, 0, 0)),
      pl.BlockSpec((1, 1, layout.resident, value_dim), lambda b, k, g, i: (b, k, 0, 0)),
    ],
    out_shape=[
      result(
        # Whole blocks: the interpreter does not cut an array that is passed on to its shape.
        (batch, num_heads, rows, up(length, layout.queries)) if passes_on else query.shape,
        jnp.float32 if passes_on else query.dtype,
        query,
      ),
      result((batch, num_kv_heads, count, head_dim), key.dtype, query),
      result((batch, num_kv_heads, count, value_dim), value.dtype, query),
    ],
    scratch_shapes=[
      pltpu.VMEM((rows, layout.queries), jnp.float32),
      sum_of(head_dim),
      sum_of(value_dim),
    ],
    input_output_aliases=aliases,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem_limit(sizes.backward_bytes(problem, blocks, generation), generation),
    ),
    name="flash_attention_backward",
  )(*arrays)


def _kernel(spec, layout, generation, first_key, query_blocks, group, adds, *refs):
  first_block, last_block = query_blocks
  query_ref, output_bar_ref, lse_ref, delta_ref, key_ref, key_columns_ref, value_ref = refs[:7]
  refs = refs[7:]
  ids, refs = (Ids(*refs[:4]), refs[4:]) if layout.has_segments else (None, refs)
  query_bar_in_ref, refs = (refs[0], refs[1:]) if adds else (None, refs)
  query_bar_ref, key_bar_ref, value_bar_ref, query_sum_ref, key_sum_ref, value_sum_ref = refs
  g, i = pl.program_id(2), pl.program_id(3) + first_block

  @pl.when((g == 0) & (i == first_block))
  def _():
    key_sum_ref[...] = jnp.zeros_like(key_sum_ref)
    value_sum_ref[...] = jnp.zeros_like(value_sum_ref)

  query_sum_ref[...] = query_bar_in_ref[0, 0] if adds else jnp.zeros_like(query_sum_ref)
  queries = [ref[0, 0] for ref in (query_ref, output_bar_ref, lse_ref, delta_ref)]
  if layout.num_queries % layout.queries:
    # All zero, the queries beyond the end add nothing to any gradient.
    left = layout.num_queries - i * layout.queries
    queries = [masking.existing(array, 1, left) for array in queries]
  query, output_bar, log_sum_exp, delta = queries

  def add_product(sum_ref: Any, keys: Any, tile: Array, columns: Array) -> None:
    if _is_narrow(columns.shape[0], generation):
      sum_ref[:, keys] += dot(columns, tile, (1, 1))
    else:
      sum_ref[keys, :] += dot(tile, columns, (1, 1))

  def add(chunk: backward_schedule.Chunk, may_end: bool) -> None:
    keys, values = key_ref[0, 0, chunk.keys, :], value_ref[0, 0, chunk.keys, :]
    key_columns = key_columns_ref[0, 0, :, chunk.keys]
    left = None
    if may_end:
      left = layout.num_keys - first_key - chunk.first
      keys, values = masking.existing(keys, 0, left), masking.existing(values, 0, left)
      key_columns = masking.existing(key_columns, 1, left)
    rows = chunk.queries
    scores, slope = masking.scale(spec, dot(keys, query[:, rows]))
    same = None
    if ids is not None:
      same = (ids.queries[0, :, rows], masking.column(ids.keys[0, :, chunk.keys])[:, :1])
    scores = masking.mask(spec, scores, 0, count=left, ids=same)
    if chunk.distance is not None:
      scores = masking.mask_edges(spec, scores, 0, chunk.distance, chunk.whole)
    weights = jnp.exp2(scores - log_sum_exp[:, rows])  # [keys, queries]
    scores_bar = weights * (dot(values, output_bar[:, rows]) - delta[:, rows]) * spec.scale
    if slope is not None:
      scores_bar = scores_bar * slope
    weights, scores_bar = weights.astype(query.dtype), scores_bar.astype(query.dtype)
    add_product(value_sum_ref, chunk.keys, weights, output_bar[:, rows])
    add_product(key_sum_ref, chunk.keys, scores_bar, query[:, rows])
    query_sum_ref[:, rows] += dot(key_columns, scores_bar)

  def add_tile(tile: Any, distance: Any, may_end: bool, _: tile_schedule.Ends) -> None:
    for chunk in backward_schedule.of_tile(layout, tile, distance):
      add(chunk, may_end)

  def add_squares(squares: Sequence[tuple[Any, int]], may_end: bool, _: tile_schedule.Ends) -> None:
    for tile, distance in squares:
      for chunk in backward_schedule.of_square(spec, layout, tile, distance, generation):
        add(chunk, may_end)

  tile_schedule.for_each_tile(spec, layout, i, first_key, ids, add_tile, add_squares)
  query_bar_ref[0, 0] = query_sum_ref[...].astype(query_bar_ref.dtype)

  @pl.when((g == group - 1) & (i == last_block - 1))
  def _():
    for bar_ref, sum_ref in ((key_bar_ref, key_sum_ref), (value_bar_ref, value_sum_ref)):
      total = sum_ref[...]
      total = total.T if _is_narrow(bar_ref.shape[3], generation) else total
      bar_ref[0, 0] = total.astype(bar_ref.dtype)


def _is_narrow(size: int, generation: Generation) -> bool:
  """Returns whether a head leaves columns of the matrix unit empty.

  Its dK or dV is summed as [size, keys] then: a product fills the columns with its right side.
  Head dim 64 takes 0.81 of the cycles (v5e), 128 takes 0.89 (v6e); 256 takes 1.03 (v6e).
  """
  return size < generation.matrix_unit
