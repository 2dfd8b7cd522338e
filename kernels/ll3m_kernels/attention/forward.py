"""The forward pass of attention on a TPU (Dao, 2023, FlashAttention-2).

A grid step processes block_q queries of a head and block_kv keys of the head's KV head, in tiles.
The step's position in the grid determines which tiles are full, partial or empty (see
`tile_schedule` and its glossary); tiles whose range of segment ids does not overlap are skipped.

Scores are [queries, keys]: each block of K^T is loaded into the matrix unit once for all queries of
a softmax update, and so is V, unless that would leave columns of the matrix unit empty
(`block_sizes.is_transposed`). In partial blocks whose diagonal offset is known at trace time,
queries are processed in bands, each multiplied only by the keys that it can see
(`forward_schedule`). Both edges of a sliding window share one softmax update.

Dimensions in the kernel: r queries and n keys of a piece (`forward_schedule`), H and Hv head dims
of keys and values.
"""

import enum
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.attention import block_sizes as sizes
from ll3m_kernels.attention import (
  decoding,
  forward_schedule,
  masking,
  online_softmax,
  tile_schedule,
)
from ll3m_kernels.attention import spec as specs
from ll3m_kernels.attention.layout import Ids, Layout, id_inputs, keys_at
from ll3m_kernels.attention.masking import LOG2_E, dot
from ll3m_kernels.block_arithmetic import LANES, up, vmem_limit
from ll3m_kernels.sharding import result


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
  generation = dispatch.generation()
  problem = sizes.problem_of(query, key, value, spec.span, query_ids is not None)
  blocks = sizes.choose_blocks(block_sizes, problem)
  # Keys that no query sees are not fetched.
  _, num_keys = specs.keys_seen_by_any(spec.span, 0, length - 1, num_keys)
  layout = Layout(
    length,
    num_keys,
    blocks.block_q,
    blocks.block_kv_compute,
    blocks.block_kv,
    query_ids is not None,
  )
  num_q_blocks = pl.cdiv(length, layout.block_q)
  num_kv_blocks = pl.cdiv(num_keys, layout.block_kv)

  def kv_index(i, j):
    """Returns the index of the block of keys to fetch, among those that the queries see."""
    if num_kv_blocks == 1:
      return 0
    first = i * layout.block_q
    last = specs.minimum(first + layout.block_q, length) - 1
    low, high = specs.keys_seen_by_any(spec.span, first, last, num_keys)
    least, most = (
      specs.divide(low, layout.block_kv),
      specs.divide(specs.maximum(high - 1, 0), layout.block_kv),
    )
    return specs.minimum(specs.maximum(j, least), specs.maximum(most, least))

  def q_spec(size):
    return pl.BlockSpec((1, 1, layout.block_q, size), lambda b, n, i, j: (b, n, i, 0))

  def kv_spec(size):
    return pl.BlockSpec(
      (1, 1, layout.block_kv, size),
      lambda b, n, i, j: (b, specs.divide(n, group), kv_index(i, j), 0),
    )

  scaling = _scaling(spec, query.dtype, head_dim)
  # Padded to whole registers. Columns beyond the head dim hold arbitrary values: they are sliced
  # off acc, and zeroed in queries and keys. Without HALVES, queries and keys need no padding.
  columns = up(head_dim, LANES) if scaling is _Scaling.HALVES else head_dim
  value_columns = up(value_dim, LANES)
  in_specs = [q_spec(columns), kv_spec(columns), kv_spec(value_columns)]
  arrays = [x.swapaxes(1, 2) for x in (query, key, value)]
  acc_shape = (layout.block_q, value_columns)
  if sizes.is_transposed(value_dim, generation):
    value_rows = sizes.rows(value_dim, value.dtype.itemsize)
    arrays[2] = value.transpose(0, 2, 3, 1)
    in_specs[2] = pl.BlockSpec(
      (1, 1, value_rows, layout.block_kv),
      lambda b, n, i, j: (b, specs.divide(n, group), 0, kv_index(i, j)),
    )
    acc_shape = (value_rows, layout.block_q)
  scratch = [(LANES, jnp.float32), (LANES, jnp.float32)]
  if scaling.needs_queries:
    scratch.append((columns * (2 if scaling is _Scaling.HALVES else 1), query.dtype))
  if layout.has_segments:
    id_arrays, id_specs = id_inputs(
      layout, query_ids, key_ids, lambda b, n, i, j: (b, i), lambda b, n, i, j: (b, kv_index(i, j))
    )
    arrays, in_specs = arrays + id_arrays, in_specs + id_specs
    scratch.append((LANES, jnp.int32))
  output, log_sum_exp = pl.pallas_call(
    functools.partial(_kernel, spec, layout, generation, num_kv_blocks, scaling, head_dim),
    grid=(batch, num_heads, num_q_blocks, num_kv_blocks),
    in_specs=in_specs,
    out_specs=[
      q_spec(value_dim),
      pl.BlockSpec((1, 1, 1, layout.block_q), lambda b, n, i, j: (b, n, 0, i)),
    ],
    out_shape=[
      result((batch, num_heads, length, value_dim), query.dtype, query),
      result((batch, num_heads, 1, length), jnp.float32, query),
    ],
    scratch_shapes=[
      pltpu.VMEM(acc_shape, jnp.float32),
      *(pltpu.VMEM((layout.block_q, size), dtype) for size, dtype in scratch),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(sizes.forward_bytes(problem, blocks, generation), generation),
    ),
    name="flash_attention_forward",
  )(*arrays)
  return output.swapaxes(1, 2), log_sum_exp[:, :, 0]


class _Scaling(enum.Enum):
  """Where scores are scaled by scale * log2(e), without rounding, so that weights are exp2(s - m).

  Attributes:
    EXPONENTS: Scales the differences of scores, before `exp2`.
    SCORES: Scales the scores. Slower, but allows a soft cap, and scales below 1e-6 or negative.
    QUERIES: Scales float32 queries.
    HALVES: Scales bfloat16 queries, each split into two bfloat16 terms: [high, low] times [k, k]
      costs nothing where the matrix unit is deep enough for both.
  """

  EXPONENTS = enum.auto()
  SCORES = enum.auto()
  QUERIES = enum.auto()
  HALVES = enum.auto()

  @property
  def needs_queries(self) -> bool:
    """Whether the kernel uses scaled copies of the queries."""
    return self in (_Scaling.QUERIES, _Scaling.HALVES)


def _scaling(spec: specs.Spec, dtype: Any, head_dim: int) -> _Scaling:
  # Scaling after masking by a tiny or negative scale could unmask scores.
  if spec.logits_soft_cap is not None or spec.scale < 1e-6:
    return _Scaling.SCORES
  if dtype == jnp.float32:
    return _Scaling.QUERIES
  fits = 2 * up(head_dim, LANES) <= dispatch.generation().matrix_unit
  return _Scaling.HALVES if fits else _Scaling.EXPONENTS


def _kernel(
  spec, layout, generation, num_kv_blocks, scaling, head_dim, query_ref, key_ref, value_ref, *refs
):
  ids, refs = (Ids(*refs[:4]), refs[4:]) if layout.has_segments else (None, refs)
  output_ref, log_sum_exp_ref, acc_ref, m_ref, l_ref, *scratch = refs
  queries_ref = scratch[0] if scaling.needs_queries else query_ref.at[0, 0]
  exponent_scale = spec.scale * LOG2_E if scaling is _Scaling.EXPONENTS else 1.0
  is_transposed = sizes.is_transposed(output_ref.shape[3], generation)
  softmax = online_softmax.Softmax(acc_ref, m_ref, l_ref, is_transposed, exponent_scale)

  # Whether the positional mask hides all padding keys from all real queries.
  right = spec.span.right
  hides_end = right is not None and layout.num_queries + right <= layout.num_keys

  i, j = pl.program_id(2), pl.program_id(3)
  first_key = j * layout.block_kv if num_kv_blocks > 1 else 0

  def zero_beyond_head(x: Array) -> Array:
    return masking.zero_beyond(x, 1, head_dim) if x.shape[1] > head_dim else x

  def start(rows: slice) -> None:
    softmax.start(rows)
    if scaling.needs_queries:
      query = zero_beyond_head(query_ref[0, 0, rows, :]).astype(jnp.float32) * (spec.scale * LOG2_E)
      high = query.astype(queries_ref.dtype)
      if scaling is _Scaling.HALVES:
        low = (query - high.astype(jnp.float32)).astype(queries_ref.dtype)
        high = jnp.concatenate([high, low], axis=1)
      queries_ref[rows, :] = high

  def finish(rows: slice) -> None:
    softmax.finish(rows, output_ref, log_sum_exp_ref)

  def start_all() -> None:
    @pl.when(j == 0)
    def _():
      start(slice(0, layout.block_q))
      if ids is not None:
        scratch[-1][...] = masking.column(ids.queries[0])

  def finish_all() -> None:
    @pl.when(j == num_kv_blocks - 1)
    def _():
      for rows in forward_schedule.rows_of_steps(layout, generation):
        finish(rows)

  def score(piece: forward_schedule.Piece, may_overrun: bool) -> tuple[Array, Array]:
    """Returns the scores and values of a piece, masked except by position."""
    columns = piece.columns
    count = columns.stop - columns.start
    index = keys_at(layout, piece.tile, columns.start, count)
    keys = zero_beyond_head(key_ref[0, 0, index, :])  # [n, H]
    # [Hv, n] or [n, Hv]
    values = value_ref[0, 0, :, index] if is_transposed else value_ref[0, 0, index, :]
    if scaling is _Scaling.HALVES:
      keys = jnp.concatenate([keys, keys], axis=1)
    scores = dot(queries_ref[piece.rows, :], keys, (1, 1))  # [r, n]
    if scaling is _Scaling.SCORES:
      scores, _ = masking.scale(spec, scores)
    remaining = None
    if may_overrun:
      remaining = layout.num_keys - first_key - piece.tile * layout.block_kv_compute - columns.start
      values = masking.zero_beyond(values, int(is_transposed), remaining)
      if piece.diagonal_offset is not None and hides_end:
        remaining = None
    id_pair = None
    if ids is not None:
      id_pair = (online_softmax.widen(scratch[-1][piece.rows, :], count), ids.keys[0, :, index])
    return masking.mask(spec, scores, 1, count=remaining, ids=id_pair), values

  def run_step(
    step: forward_schedule.Step,
    scored: Sequence[tuple[Array, Array]],
    ahead: Iterator[tuple[Array, Array]],
  ) -> list[tuple[Array, Array]]:
    """Runs one step: one softmax update, with any number of pieces.

    Args:
      step: The queries and keys.
      scored: The result of `score` for each piece of the step.
      ahead: Yields the results of `score` for the next step. Their computation is interleaved with
        this step's products.

    Returns:
      All results that `ahead` yields.
    """
    updates = []
    for rows, full_columns in step.bands:
      scores = {}
      for n, full in full_columns:
        piece = step.pieces[n]
        part = scored[n][0][_within_piece(piece, rows)]
        scores[n] = _mask_edges(spec, part, rows, piece, full)
      updates.append(online_softmax.Update(softmax, rows, scores))
    next_scored = []
    for n, (piece, (_, values)) in enumerate(zip(step.pieces, scored, strict=True)):
      next_scored.extend(itertools.islice(ahead, 1))
      piece_updates = [update for update in updates if update.has_piece(n)]
      weights = jnp.concatenate([update.take_weights(n) for update in piece_updates], axis=0)
      weights = weights.astype(values.dtype)  # [r, n]
      # [Hv, r] or [r, Hv]
      product = dot(values, weights, (1, 1)) if is_transposed else dot(weights, values)
      for update in piece_updates:
        rows = _within_piece(piece, update.rows)
        update.add(product[:, rows] if is_transposed else product[rows])
    for update in updates:
      update.store()
    return [*next_scored, *ahead]

  def run_steps(
    steps: Sequence[forward_schedule.Step], may_overrun: bool, ends: tile_schedule.Ends
  ) -> None:
    if ends.starts:
      start(slice(0, layout.block_q))
    scored: Sequence[tuple[Array, Array]] = []
    for step, following in itertools.zip_longest(steps, steps[1:]):
      scored = scored or [score(piece, may_overrun) for piece in step.pieces]
      # If transposed, the next step's scores are computed while weights are loaded.
      next_pieces = following.pieces if following is not None and is_transposed else []
      scored = run_step(step, scored, (score(piece, may_overrun) for piece in next_pieces))
      if ends.finishes:
        finish(slice(step.bands[0].rows.start, step.bands[-1].rows.stop))

  def add_tile(
    tile: Any, diagonal_offset: Any, may_overrun: bool, ends: tile_schedule.Ends
  ) -> None:
    run_steps(
      forward_schedule.tile_steps(layout, tile, diagonal_offset, generation), may_overrun, ends
    )

  def add_partial_blocks(
    partial_blocks: Sequence[tuple[Any, int]], may_overrun: bool, ends: tile_schedule.Ends
  ) -> None:
    run_steps(
      forward_schedule.partial_block_steps(spec, layout, partial_blocks, generation),
      may_overrun,
      ends,
    )

  def fit_together(partial_blocks: Sequence[tuple[Any, int]]) -> bool:
    steps = forward_schedule.partial_block_steps(spec, layout, partial_blocks, generation)
    return forward_schedule.fit_memory(layout, steps, generation)

  tile_schedule.for_each_tile(
    spec,
    layout,
    i,
    first_key,
    ids,
    add_tile,
    add_partial_blocks,
    fit_together,
    start_all,
    finish_all,
  )


def _within_piece(piece: forward_schedule.Piece, rows: slice) -> slice:
  """Converts a range of the block's queries to a range within a piece."""
  return slice(rows.start - piece.rows.start, rows.stop - piece.rows.start)


def _mask_edges(
  spec: specs.Spec,
  scores: Float[Array, "r n"],
  rows: slice,
  piece: forward_schedule.Piece,
  full: slice,
) -> Float[Array, "r n"]:
  """Masks by position, except for the keys that all queries of the band see."""
  if piece.diagonal_offset is None:
    return scores
  start = piece.columns.start
  diagonal_offset = piece.diagonal_offset + start - rows.start
  return masking.mask_edges(
    spec, scores, 1, diagonal_offset, slice(full.start - start, full.stop - start)
  )
