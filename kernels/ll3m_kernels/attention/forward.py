"""The forward pass of attention on a TPU (Dao, 2023, FlashAttention-2).

A grid step has a block of queries of one head and the resident keys of its KV head. It walks these
in tiles, and knows from its place in the grid which of them the mask cuts, which it leaves whole
and which no query sees; tiles of other segments are skipped by the ranges of their ids.

Scores are [queries, keys]: each square of K^T is loaded into the matrix unit once for all queries
of a step, and so is V, unless it would leave columns of that empty (`block_sizes.is_turned`). On
partially masked tiles the mask's offset is static (`tile_schedule.cuts`), so queries are processed
in bands, each multiplied only by the keys that it can see (`forward_schedule`). Both edges of a
sliding window share one softmax update.
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
  # What no query sees is not even fetched.
  _, num_keys = specs.some_see(spec.span, 0, length - 1, num_keys)
  layout = Layout(
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
    return pl.BlockSpec((1, 1, layout.queries, size), lambda b, n, i, j: (b, n, i, 0))

  def of_keys(size):
    return pl.BlockSpec(
      (1, 1, layout.resident, size),
      lambda b, n, i, j: (b, specs.divide(n, group), key_block(i, j), 0),
    )

  scaling = _scaling(spec, query.dtype, head_dim)
  # Whole registers, which hold anything beyond the head: that is cut off of sums of values, and
  # zeroed in queries and keys. Those keep to the head where there are no halves to stand in lanes.
  columns = up(head_dim, LANES) if scaling is _Scaling.HALVES else head_dim
  value_columns = up(value_dim, LANES)
  in_specs = [of_queries(columns), of_keys(columns), of_keys(value_columns)]
  arrays = [x.swapaxes(1, 2) for x in (query, key, value)]
  sum_shape = (layout.queries, value_columns)
  if sizes.is_turned(value_dim, generation):
    value_rows = sizes.rows(value_dim, value.dtype.itemsize)
    arrays[2] = value.transpose(0, 2, 3, 1)
    in_specs[2] = pl.BlockSpec(
      (1, 1, value_rows, layout.resident),
      lambda b, n, i, j: (b, specs.divide(n, group), 0, key_block(i, j)),
    )
    sum_shape = (value_rows, layout.queries)
  scratch = [(LANES, jnp.float32), (LANES, jnp.float32)]
  if scaling.needs_queries:
    scratch.append((columns * (2 if scaling is _Scaling.HALVES else 1), query.dtype))
  if layout.has_segments:
    id_arrays, id_specs = id_inputs(
      layout, query_ids, key_ids, lambda b, n, i, j: (b, i), lambda b, n, i, j: (b, key_block(i, j))
    )
    arrays, in_specs = arrays + id_arrays, in_specs + id_specs
    scratch.append((LANES, jnp.int32))
  output, log_sum_exp = pl.pallas_call(
    functools.partial(_kernel, spec, layout, generation, key_blocks, scaling, head_dim),
    grid=(batch, num_heads, query_blocks, key_blocks),
    in_specs=in_specs,
    out_specs=[
      of_queries(value_dim),
      pl.BlockSpec((1, 1, 1, layout.queries), lambda b, n, i, j: (b, n, 0, i)),
    ],
    out_shape=[
      result((batch, num_heads, length, value_dim), query.dtype, query),
      result((batch, num_heads, 1, length), jnp.float32, query),
    ],
    scratch_shapes=[
      pltpu.VMEM(sum_shape, jnp.float32),
      *(pltpu.VMEM((layout.queries, size), dtype) for size, dtype in scratch),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem_limit(sizes.forward_bytes(problem, blocks, generation), generation),
    ),
    name="flash_attention_forward",
  )(*arrays)
  return output.swapaxes(1, 2), log_sum_exp[:, :, 0]


class _Scaling(enum.Enum):
  """Where the scale, times log2(e) for a power of two, is multiplied in, without a rounding.

  Attributes:
    EXPONENTS: into the differences of scores that are raised to powers.
    SCORES: into the scores: slower, but it takes a soft cap, and a scale that turns their order.
    QUERIES: into float32 queries.
    HALVES: into bfloat16 queries, each of which becomes the sum of two: [high, low] meets [k, k],
      which costs nothing where the matrix unit is deep enough for both.
  """

  EXPONENTS = enum.auto()
  SCORES = enum.auto()
  QUERIES = enum.auto()
  HALVES = enum.auto()

  @property
  def needs_queries(self) -> bool:
    """Whether there are other queries than the caller's."""
    return self in (_Scaling.QUERIES, _Scaling.HALVES)


def _scaling(spec: specs.Spec, dtype: Any, head_dim: int) -> _Scaling:
  # What is masked must vanish also when it is scaled late.
  if spec.logits_soft_cap is not None or spec.scale < 1e-6:
    return _Scaling.SCORES
  if dtype == jnp.float32:
    return _Scaling.QUERIES
  fits = 2 * up(head_dim, LANES) <= dispatch.generation().matrix_unit
  return _Scaling.HALVES if fits else _Scaling.EXPONENTS


def _kernel(
  spec, layout, generation, key_blocks, scaling, head_dim, query_ref, key_ref, value_ref, *refs
):
  ids, refs = (Ids(*refs[:4]), refs[4:]) if layout.has_segments else (None, refs)
  output_ref, log_sum_exp_ref, sum_ref, largest_ref, total_ref, *scratch = refs
  queries_ref = scratch[0] if scaling.needs_queries else query_ref.at[0, 0]
  late = spec.scale * LOG2_E if scaling is _Scaling.EXPONENTS else 1.0
  is_turned = sizes.is_turned(output_ref.shape[3], generation)
  known = online_softmax.Softmax(sum_ref, largest_ref, total_ref, is_turned, late)

  # Whether position hides what is beyond the last key from all queries that there are.
  right = spec.span.right
  hides_end = right is not None and layout.num_queries + right <= layout.num_keys

  i, j = pl.program_id(2), pl.program_id(3)
  first_key = j * layout.resident if key_blocks > 1 else 0

  def of_head(x: Array) -> Array:
    return masking.existing(x, 1, head_dim) if x.shape[1] > head_dim else x

  def start(rows: slice) -> None:
    known.start(rows)
    if scaling.needs_queries:
      query = of_head(query_ref[0, 0, rows, :]).astype(jnp.float32) * (spec.scale * LOG2_E)
      high = query.astype(queries_ref.dtype)
      if scaling is _Scaling.HALVES:
        low = (query - high.astype(jnp.float32)).astype(queries_ref.dtype)
        high = jnp.concatenate([high, low], axis=1)
      queries_ref[rows, :] = high

  def finish(rows: slice) -> None:
    known.finish(rows, output_ref, log_sum_exp_ref)

  def start_all() -> None:
    @pl.when(j == 0)
    def _():
      start(slice(0, layout.queries))
      if ids is not None:
        scratch[-1][...] = masking.column(ids.queries[0])

  def finish_all() -> None:
    @pl.when(j == key_blocks - 1)
    def _():
      for rows in forward_schedule.rows_of_steps(layout, generation):
        finish(rows)

  def score(piece: forward_schedule.Piece, may_end: bool) -> tuple[Array, Array]:
    """Returns the scores of some keys, masked but for position, and their values."""
    columns = piece.columns
    count = columns.stop - columns.start
    index = keys_at(layout, piece.tile, columns.start, count)
    keys = of_head(key_ref[0, 0, index, :])
    values = value_ref[0, 0, :, index] if is_turned else value_ref[0, 0, index, :]
    if scaling is _Scaling.HALVES:
      keys = jnp.concatenate([keys, keys], axis=1)
    scores = dot(queries_ref[piece.rows, :], keys, (1, 1))
    if scaling is _Scaling.SCORES:
      scores, _ = masking.scale(spec, scores)
    left = None
    if may_end:
      left = layout.num_keys - first_key - piece.tile * layout.keys - columns.start
      values = masking.existing(values, int(is_turned), left)
      if piece.distance is not None and hides_end:
        left = None
    same = None
    if ids is not None:
      same = (online_softmax.widen(scratch[-1][piece.rows, :], count), ids.keys[0, :, index])
    return masking.mask(spec, scores, 1, count=left, ids=same), values

  def add(
    step: forward_schedule.Step,
    scored: Sequence[tuple[Array, Array]],
    ahead: Iterator[tuple[Array, Array]],
  ) -> list[tuple[Array, Array]]:
    """Adds to some queries what some keys give: one update, of however many pieces.

    Args:
      step: the queries and keys.
      scored: what `score` gave for the pieces.
      ahead: yields what it gives for those of the next step, between the products of this one.

    Returns:
      All that `ahead` yields.
    """
    updates = []
    for rows, seen in step.bands:
      scores = {}
      for n, whole in seen:
        piece = step.pieces[n]
        part = scored[n][0][_within(piece, rows)]
        scores[n] = _mask_edges(spec, part, rows, piece, whole)
      updates.append(online_softmax.Update(known, rows, scores))
    found = []
    for n, (piece, (_, values)) in enumerate(zip(step.pieces, scored, strict=True)):
      found.extend(itertools.islice(ahead, 1))
      meeting = [update for update in updates if update.meets(n)]
      weights = jnp.concatenate([update.weights(n) for update in meeting], axis=0)
      weights = weights.astype(values.dtype)
      product = dot(values, weights, (1, 1)) if is_turned else dot(weights, values)
      for update in meeting:
        rows = _within(piece, update.rows)
        update.add(product[:, rows] if is_turned else product[rows])
    for update in updates:
      update.store()
    return [*found, *ahead]

  def add_all(
    steps: Sequence[forward_schedule.Step], may_end: bool, ends: tile_schedule.Ends
  ) -> None:
    if ends.starts:
      start(slice(0, layout.queries))
    scored: Sequence[tuple[Array, Array]] = []
    for step, following in itertools.zip_longest(steps, steps[1:]):
      scored = scored or [score(piece, may_end) for piece in step.pieces]
      # While weights are loaded into the matrix unit, it has the next step's scores to do.
      next_pieces = following.pieces if following is not None and is_turned else []
      scored = add(step, scored, (score(piece, may_end) for piece in next_pieces))
      if ends.finishes:
        finish(slice(step.bands[0].rows.start, step.bands[-1].rows.stop))

  def add_tile(tile: Any, distance: Any, may_end: bool, ends: tile_schedule.Ends) -> None:
    add_all(forward_schedule.whole(layout, tile, distance, generation), may_end, ends)

  def add_squares(
    squares: Sequence[tuple[Any, int]], may_end: bool, ends: tile_schedule.Ends
  ) -> None:
    add_all(forward_schedule.staircase(spec, layout, squares, generation), may_end, ends)

  def fit_together(squares: Sequence[tuple[Any, int]]) -> bool:
    steps = forward_schedule.staircase(spec, layout, squares, generation)
    return forward_schedule.fit_memory(layout, steps, generation)

  tile_schedule.for_each_tile(
    spec,
    layout,
    i,
    first_key,
    ids,
    add_tile,
    add_squares,
    fit_together,
    start_all,
    finish_all,
  )


def _within(piece: forward_schedule.Piece, rows: slice) -> slice:
  """Returns where some queries of a block stand in a piece."""
  return slice(rows.start - piece.rows.start, rows.stop - piece.rows.start)


def _mask_edges(
  spec: specs.Spec,
  scores: Float[Array, "r k"],
  rows: slice,
  piece: forward_schedule.Piece,
  whole: slice,
) -> Float[Array, "r k"]:
  """Masks what position hides from some queries of a band, and leaves alone what all see."""
  if piece.distance is None:
    return scores
  start = piece.columns.start
  distance = piece.distance + start - rows.start
  return masking.mask_edges(
    spec, scores, 1, distance, slice(whole.start - start, whole.stop - start)
  )
