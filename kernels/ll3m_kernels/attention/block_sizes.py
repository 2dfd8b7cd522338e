"""How attention is cut into pieces that fit a TPU core's vector memory.

T queries, S keys, H and Hv head dims of keys and values. A tile is [keys, queries] of scores.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ll3m_kernels import block_tables, dispatch
from ll3m_kernels.attention.backward_schedule import chunk_size
from ll3m_kernels.attention.forward_schedule import step_size
from ll3m_kernels.attention.spec import Span
from ll3m_kernels.block_arithmetic import LANES, even, up, vmem_limit
from ll3m_kernels.dispatch import MIB, Generation


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Sizes in tokens: multiples of 128, or the whole length where that is shorter.

  Attributes:
    queries: of a tile of the forward pass.
    keys: of a tile of the forward pass.
    keys_resident: fetched together by the forward pass; a multiple of `keys`.
    queries_backward: of a tile of the backward pass.
    keys_backward: of a tile of the backward pass.
    keys_resident_backward: whose gradients the backward pass holds in memory at a time; a
      multiple of `keys_backward`.
  """

  queries: int
  keys: int
  keys_resident: int
  queries_backward: int
  keys_backward: int
  keys_resident_backward: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      size = getattr(self, field.name)
      if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"block_sizes.{field.name} must be a positive integer, got {size!r}")
    for resident, tile in (
      ("keys_resident", "keys"),
      ("keys_resident_backward", "keys_backward"),
    ):
      if getattr(self, resident) % getattr(self, tile):
        raise ValueError(
          f"block_sizes.{resident} must be a multiple of {tile} ({getattr(self, tile)}), "
          f"got {getattr(self, resident)}"
        )


@dataclasses.dataclass(frozen=True)
class Problem:
  """The shapes of a call, as far as memory depends on them."""

  queries: int  # T
  keys: int  # S
  head_dim: int  # H
  value_dim: int  # Hv
  itemsize: int  # bytes of an input's element
  has_segments: bool
  mask: str = "causal"  # "full", "causal" or "window"


class Limits(NamedTuple):
  """The largest tiles, in tokens: lengths are cut evenly into as few as they allow.

  Attributes:
    queries: of a tile of the forward pass.
    keys: of a tile of the forward pass.
    queries_backward: of a tile of the backward pass.
    keys_backward: of a tile of the backward pass.
  """

  queries: int
  keys: int
  queries_backward: int
  keys_backward: int


def choose_blocks(given: BlockSizes | None, problem: Problem) -> BlockSizes:
  """Returns the blocks of a call, for the TPU at hand.

  Args:
    given: the caller's own choice, if any.
    problem: what is to be cut.

  Raises:
    ValueError: the caller's choice cannot be laid out.
  """
  generation = dispatch.generation()
  if given is None:
    return default_blocks(problem, generation)
  check(given, problem, generation)
  return fit(given, problem)


def default_blocks(problem: Problem, generation: Generation) -> BlockSizes:
  """Chooses the tiles that are known to suit, and as many resident keys as there is room for."""
  found = block_tables.find(key_of(problem, generation))
  # What was tuned without segments, or for another length, may be too much here.
  if found is not None and serves(Limits(**found), problem, generation):
    return _within(Limits(**found), problem, generation)
  return _within(rule(problem, generation), problem, generation)


def serves(limits: Limits, problem: Problem, generation: Generation) -> bool:
  """Returns whether tiles of these limits fit the memory, and leave some to the compiler."""
  return all(
    _leaves_room(count, limits, problem, generation) for count in (forward_bytes, backward_bytes)
  )


def _leaves_room(
  count: Callable[..., int], limits: Limits, problem: Problem, generation: Generation
) -> bool:
  needed = count(problem, _within(limits, problem, generation), generation)
  return vmem_limit(needed, generation) <= 0.75 * generation.vmem_bytes


def key_of(problem: Problem, generation: Generation) -> block_tables.Key:
  """Returns under what the tables have a problem."""
  return block_tables.Key(
    "flash_attention",
    generation.name,
    {2: "bfloat16", 4: "float32"}[problem.itemsize],
    problem.head_dim if problem.head_dim == problem.value_dim else 0,  # no table has these
    problem.mask,
    block_tables.length_bucket(max(problem.queries, problem.keys)),
  )


def rule(problem: Problem, generation: Generation) -> Limits:
  """Returns the largest sensible tiles, smaller where an element or a head is large."""
  is_large, is_largest = (generation.vmem_bytes >= size * MIB for size in (64, 128))
  is_wide = max(problem.head_dim, problem.value_dim) > LANES
  tile = 1024 if is_large else 512
  backward = tile // 2
  if problem.itemsize > 2 or is_wide:
    tile //= 2
    # On v6e, a head dim of 256 takes 0.63 of the cycles with tiles of 512 that it takes with 256.
    backward = backward if is_large and problem.itemsize == 2 else tile // 2
  # K is loaded into the matrix unit once for all queries of a step, and V where it is not turned.
  queries = max(tile, 2048) if is_large else tile
  keys, queries_backward, keys_backward = tile, backward, backward
  if problem.itemsize == 2 and is_large:
    # On v6e, full masks take 0.96 of the cycles with 2048 that they take with 1024; on v5e, causal
    # masks and windows take 0.995, but full ones 1.01.
    if is_largest and not is_wide and (problem.mask != "full" or generation.matrix_unit > LANES):
      keys = 2048
    # Causal, backward takes 0.83 (v6e) and 0.92 (v5e) of the cycles with 2048 queries, not 512.
    queries_backward = 2048 if is_largest or not is_wide else 1024
    if problem.mask == "full" and (is_largest or not is_wide):
      keys_backward = 2048  # none of them in vain; 0.963 (v6e) and 0.988 (v5e) of 512
  limits = Limits(queries, keys, queries_backward, keys_backward)
  if problem.itemsize > 2 or not is_large or problem.mask == "window":
    return limits
  # What begins and ends a block runs beside products if that is all one piece of code: at T = 4096,
  # causal, forward takes 0.95 (v6e) and 0.97 (v5e) of the cycles, backward 0.93 and 0.97.
  for count, most in (
    (forward_bytes, {"queries": 4096}),
    (backward_bytes, {"queries_backward": 4096, "keys_backward": 2048}),
  ):
    if _leaves_room(count, limits._replace(**most), problem, generation):
      limits = limits._replace(**most)
  return limits


def _within(limits: Limits, problem: Problem, generation: Generation) -> BlockSizes:
  queries, keys = _tile(problem, limits.queries, limits.keys)
  queries_backward, keys_backward = _tile(problem, limits.queries_backward, limits.keys_backward)
  blocks = BlockSizes(queries, keys, keys, queries_backward, keys_backward, keys_backward)
  for field, block, count in (
    ("keys_resident", queries, forward_bytes),
    ("keys_resident_backward", queries_backward, backward_bytes),
  ):
    keys = getattr(blocks, field)  # of one tile
    # Whole squares, see `tile_schedule.cuts`; where there are fewer keys than lanes, a block ends
    # with the keys.
    if block % keys == 0 and keys % LANES == 0:
      keys = block
    parts = -(-problem.keys // keys)
    while parts >= 1:
      trial = dataclasses.replace(blocks, **{field: keys * parts})
      if parts == 1 or count(problem, trial, generation) <= 0.75 * generation.vmem_bytes:
        blocks = trial
        break
      parts = -(-parts // 2)
  return blocks


def _tile(problem: Problem, most_queries: int, most_keys: int) -> tuple[int, int]:
  """Returns the queries and keys of a tile: as many tiles' worth of queries as may be."""
  keys = even(problem.keys, most_keys)
  queries = even(problem.queries, min(most_keys, most_queries))
  if queries == keys:
    # As many as leave the least of the last block beyond the end.
    most = max(most_queries // keys, 1)
    queries = keys * min(range(most, 0, -1), key=lambda n: -(-problem.queries // (n * keys)) * n)
  return queries, keys


def fit(blocks: BlockSizes, problem: Problem) -> BlockSizes:
  """Cuts blocks down to the lengths that there are."""
  keys, keys_backward = min(blocks.keys, problem.keys), min(blocks.keys_backward, problem.keys)
  queries = _cut(problem, blocks.queries, keys)
  queries_backward = _cut(problem, blocks.queries_backward, keys_backward)
  most_tiles = blocks.keys_resident // blocks.keys
  most_tiles_backward = blocks.keys_resident_backward // blocks.keys_backward
  return BlockSizes(
    queries=queries,
    keys=keys,
    keys_resident=_resident(problem, most_tiles, queries, keys),
    queries_backward=queries_backward,
    keys_backward=keys_backward,
    keys_resident_backward=_resident(problem, most_tiles_backward, queries_backward, keys_backward),
  )


def _cut(problem: Problem, queries: int, keys: int) -> int:
  # Whole squares, in which the mask's edges are known, may extend beyond the end: see
  # `tile_schedule.cuts`.
  is_square = queries % keys == 0 and queries <= up(problem.queries, keys)
  return queries if is_square else min(queries, problem.queries)


def _resident(problem: Problem, most_tiles: int, queries: int, keys: int) -> int:
  count = -(-problem.keys // keys)
  if queries % keys == 0 and keys % LANES == 0:
    count = up(count, queries // keys)
  return keys * min(most_tiles, count)


def check(blocks: BlockSizes, problem: Problem, generation: Generation) -> None:
  """Demands that blocks of the caller's own choice can be laid out.

  Raises:
    ValueError: not a multiple of 128, or too large for the memory, with how large they are.
  """
  for field in dataclasses.fields(blocks):
    size = getattr(blocks, field.name)
    length = problem.queries if field.name.startswith("queries") else problem.keys
    if size % LANES and size < length:
      raise ValueError(
        f"block_sizes.{field.name} must be a multiple of {LANES} or at least the length "
        f"{length}, got {size}"
      )
  fitted = fit(blocks, problem)
  for name, count in (("forward", forward_bytes), ("backward", backward_bytes)):
    needed = count(problem, fitted, generation)
    if needed > generation.vmem_bytes:
      raise ValueError(
        f"block_sizes need {needed / MIB:.1f} MiB of vector memory in the {name} pass, a core of "
        f"a {generation.name} has {generation.vmem_bytes / MIB:.0f} MiB: {blocks}"
      )


def forward_bytes(problem: Problem, blocks: BlockSizes, generation: Generation) -> int:
  """Returns the vector memory that the forward pass takes: blocks twice, scratch and scores once.

  Of a step's scores in a tile the compiler was seen to keep up to three arrays, in float32: two and
  a half, as what it is granted is more than what is counted. A block that is all one piece of code
  keeps more at once, but not all of these: 34 MiB of 36 at most (v5p, causal, 4096 queries).
  """
  width = problem.itemsize
  queries, keys, resident = blocks.queries, blocks.keys, blocks.keys_resident
  key_columns, value_columns = up(problem.head_dim, LANES), up(problem.value_dim, LANES)
  streamed = queries * (key_columns + value_columns) * width
  if is_turned(problem.value_dim, generation):
    value_columns = rows(problem.value_dim, width)
  streamed += resident * (key_columns + value_columns) * width
  streamed += 8 * 4 * (queries + (queries + resident) * problem.has_segments)
  statistics = (2 + problem.has_segments) * LANES
  scratch = queries * (4 * (value_columns + statistics) + 2 * key_columns * width)
  meet = queries if queries % keys == 0 else keys  # squares: see `tile_schedule.cuts`
  scores = up(step_size(queries, generation), 8) * up(meet, LANES)
  return 2 * streamed + scratch + 10 * scores


def is_turned(value_dim: int, generation: Generation) -> bool:
  """Returns whether the forward pass sums values by weights as [Hv, queries].

  The product's columns fill the matrix unit then, but weights have to be loaded into that instead
  of values. At T = 4096, causal, head dim 64 takes 0.79 of the cycles and 96 takes 0.88 (v5e), but
  128 takes 1.01 (v6e): there a load takes as long as it saves.
  """
  return value_dim < generation.matrix_unit <= LANES


def backward_bytes(problem: Problem, blocks: BlockSizes, generation: Generation) -> int:
  """Returns the same for the backward pass, with three arrays of a chunk's scores."""
  width = problem.itemsize
  queries, keys = blocks.queries_backward, blocks.keys_backward
  resident = blocks.keys_resident_backward
  columns = up(problem.head_dim, LANES) + up(problem.value_dim, LANES)
  streamed = (
    queries * (2 * rows(problem.head_dim, width) * 4 + rows(problem.value_dim, width) * width)
    + resident * (2 * columns + rows(problem.head_dim, width)) * width
    + 8 * 4 * (2 * queries + (queries + resident) * problem.has_segments)
  )
  scratch = resident * columns * 4 + queries * rows(problem.head_dim, width) * 4
  return 2 * streamed + scratch + 3 * 4 * up(queries, LANES) * up(chunk_size(keys), 8)


def problem_of(query, key, value, span: Span, has_segments: bool) -> Problem:
  """Describes arrays [B, T, N, H], [B, S, K, H] and [B, S, K, Hv], and what is seen of them."""
  return Problem(
    queries=query.shape[1],
    keys=key.shape[1],
    head_dim=query.shape[3],
    value_dim=value.shape[3],
    itemsize=jnp.dtype(query.dtype).itemsize,
    has_segments=has_segments,
    mask="window" if span.left is not None else "full" if span.right is None else "causal",
  )


def rows(size: int, itemsize: int) -> int:
  """Rounds a count of sublanes up to whole registers."""
  return up(size, 32 // itemsize)
