"""Block sizes of the attention kernels, and the vector memory that they need.

See the glossary of `tile_schedule`. T queries, S keys, H and Hv head dims of keys and values.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """Block sizes in tokens: each a multiple of 128, or at least the whole length.

  Attributes:
    block_q: Number of queries of a tile in the forward pass.
    block_kv_compute: Number of keys of a tile in the forward pass.
    block_kv: Number of keys that a grid step of the forward pass holds in memory; a multiple of
      `block_kv_compute`.
    block_q_backward: Number of queries of a tile in the backward pass.
    block_kv_compute_backward: Number of keys of a tile in the backward pass.
    block_kv_backward: Number of keys whose gradients one call of the backward pass holds in memory;
      a multiple of `block_kv_compute_backward`.
  """

  block_q: int
  block_kv_compute: int
  block_kv: int
  block_q_backward: int
  block_kv_compute_backward: int
  block_kv_backward: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      size = getattr(self, field.name)
      if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"block_sizes.{field.name} must be a positive integer, got {size!r}")
    for block_kv, compute in (
      ("block_kv", "block_kv_compute"),
      ("block_kv_backward", "block_kv_compute_backward"),
    ):
      if getattr(self, block_kv) % getattr(self, compute):
        raise ValueError(
          f"block_sizes.{block_kv} must be a multiple of {compute} ({getattr(self, compute)}), "
          f"got {getattr(self, block_kv)}"
        )


@dataclasses.dataclass(frozen=True)
class Problem:
  """The properties of a call that the choice of block sizes depends on."""

  queries: int  # T
  keys: int  # S
  head_dim: int  # H
  value_dim: int  # Hv
  itemsize: int  # bytes of an input's element
  has_segments: bool
  mask: str = "causal"  # "full", "causal" or "window"


class Limits(NamedTuple):
  """Upper bounds of block sizes, in tokens; a length is split evenly into as few blocks as allowed.

  Attributes:
    block_q: Number of queries of a tile in the forward pass.
    block_kv_compute: Number of keys of a tile in the forward pass.
    block_q_backward: Number of queries of a tile in the backward pass.
    block_kv_compute_backward: Number of keys of a tile in the backward pass.
  """

  block_q: int
  block_kv_compute: int
  block_q_backward: int
  block_kv_compute_backward: int


def choose_blocks(given: BlockSizes | None, problem: Problem) -> BlockSizes:
  """Returns the block sizes of a call, for the TPU in use.

  Args:
    given: The block sizes that the caller chose; None for the default ones.
    problem: The shapes of the call.

  Raises:
    ValueError: The given block sizes do not fit the shapes or the memory.
  """
  generation = dispatch.generation()
  if given is None:
    return default_blocks(problem, generation)
  check(given, problem, generation)
  return fit(given, problem)


def default_blocks(problem: Problem, generation: Generation) -> BlockSizes:
  """Returns the block sizes of a table or of `rule`, with the largest block_kv that fits memory."""
  found = block_tables.find(key_of(problem, generation), Limits)
  # Block sizes that were tuned without segments, or for another length, may not fit.
  if found is not None and serves(found, problem, generation):
    return _within(found, problem, generation)
  return _within(rule(problem, generation), problem, generation)


def serves(limits: Limits, problem: Problem, generation: Generation) -> bool:
  """Returns whether blocks of these limits need at most three quarters of the vector memory."""
  return all(
    _leaves_room(count, limits, problem, generation) for count in (forward_bytes, backward_bytes)
  )


def _leaves_room(
  count: Callable[..., int], limits: Limits, problem: Problem, generation: Generation
) -> bool:
  needed = count(problem, _within(limits, problem, generation), generation)
  return vmem_limit(needed, generation) <= 0.75 * generation.vmem_bytes


def key_of(problem: Problem, generation: Generation) -> block_tables.Key:
  """Returns the key of a problem in the tables."""
  return block_tables.Key(
    "flash_attention",
    generation.name,
    {2: "bfloat16", 4: "float32"}[problem.itemsize],
    problem.head_dim if problem.head_dim == problem.value_dim else 0,  # no table has size 0
    problem.mask,
    block_tables.length_bucket(max(problem.queries, problem.keys)),
  )


def rule(problem: Problem, generation: Generation) -> Limits:
  """Returns the default limits; they are smaller for large elements and large heads."""
  is_large, is_largest = (generation.vmem_bytes >= size * MIB for size in (64, 128))
  is_wide = max(problem.head_dim, problem.value_dim) > LANES
  tile = 1024 if is_large else 512
  backward = tile // 2
  if problem.itemsize > 2 or is_wide:
    tile //= 2
    # On v6e, a head dim of 256 takes 0.63 of the cycles with tiles of 512 that it takes with 256.
    backward = backward if is_large and problem.itemsize == 2 else tile // 2
  # K is loaded into the matrix unit once for all queries of a step, and so is V unless acc is
  # transposed.
  block_q = max(tile, 2048) if is_large else tile
  block_kv_compute, block_q_backward, block_kv_compute_backward = tile, backward, backward
  if problem.itemsize == 2 and is_large:
    # On v6e, full masks take 0.96 of the cycles with 2048 that they take with 1024; on v5e, causal
    # masks and windows take 0.995, but full ones 1.01.
    if is_largest and not is_wide and (problem.mask != "full" or generation.matrix_unit > LANES):
      block_kv_compute = 2048
    # Causal, backward takes 0.83 (v6e) and 0.92 (v5e) of the cycles with 2048 queries, not 512.
    block_q_backward = 2048 if is_largest or not is_wide else 1024
    if problem.mask == "full" and (is_largest or not is_wide):
      # No score is masked: 0.963 (v6e) and 0.988 (v5e) of the cycles with 512.
      block_kv_compute_backward = 2048
  limits = Limits(block_q, block_kv_compute, block_q_backward, block_kv_compute_backward)
  if problem.itemsize > 2 or not is_large or problem.mask == "window":
    return limits
  # A single block is one piece of code, in which the start and the end overlap products: at
  # T = 4096, causal, forward takes 0.95 (v6e) and 0.97 (v5e) of the cycles, backward 0.93 and 0.97.
  for count, larger in (
    (forward_bytes, {"block_q": 4096}),
    (backward_bytes, {"block_q_backward": 4096, "block_kv_compute_backward": 2048}),
  ):
    if _leaves_room(count, limits._replace(**larger), problem, generation):
      limits = limits._replace(**larger)
  return limits


def _within(limits: Limits, problem: Problem, generation: Generation) -> BlockSizes:
  block_q, block_kv = _tile(problem, limits.block_q, limits.block_kv_compute)
  block_q_backward, block_kv_backward = _tile(
    problem, limits.block_q_backward, limits.block_kv_compute_backward
  )
  blocks = BlockSizes(
    block_q=block_q,
    block_kv_compute=block_kv,
    block_kv=block_kv,
    block_q_backward=block_q_backward,
    block_kv_compute_backward=block_kv_backward,
    block_kv_backward=block_kv_backward,
  )
  for field, block_q, count in (
    ("block_kv", blocks.block_q, forward_bytes),
    ("block_kv_backward", blocks.block_q_backward, backward_bytes),
  ):
    unit = getattr(blocks, field)  # of one tile
    # Whole partial blocks, see `tile_schedule.diagonal_offsets`. With fewer keys than lanes, a
    # block ends with the keys.
    if block_q % unit == 0 and unit % LANES == 0:
      unit = block_q
    parts = -(-problem.keys // unit)
    while parts >= 1:
      trial = dataclasses.replace(blocks, **{field: unit * parts})
      if parts == 1 or count(problem, trial, generation) <= 0.75 * generation.vmem_bytes:
        blocks = trial
        break
      parts = -(-parts // 2)
  return blocks


def _tile(problem: Problem, max_block_q: int, max_block_kv_compute: int) -> tuple[int, int]:
  """Returns block_q, if possible a large multiple of block_kv_compute, and block_kv_compute."""
  block_kv_compute = even(problem.keys, max_block_kv_compute)
  block_q = even(problem.queries, min(max_block_kv_compute, max_block_q))
  if block_q == block_kv_compute:
    # The largest multiple among those with the shortest overhang of the last block.
    most = max(max_block_q // block_q, 1)
    multiples = range(most, 0, -1)
    block_q *= min(multiples, key=lambda n: -(-problem.queries // (n * block_kv_compute)) * n)
  return block_q, block_kv_compute


def fit(blocks: BlockSizes, problem: Problem) -> BlockSizes:
  """Reduces block sizes to the lengths of a call."""
  block_kv_compute = min(blocks.block_kv_compute, problem.keys)
  block_kv_compute_backward = min(blocks.block_kv_compute_backward, problem.keys)
  block_q = _fit_block_q(problem, blocks.block_q, block_kv_compute)
  block_q_backward = _fit_block_q(problem, blocks.block_q_backward, block_kv_compute_backward)
  most_tiles = blocks.block_kv // blocks.block_kv_compute
  most_tiles_backward = blocks.block_kv_backward // blocks.block_kv_compute_backward
  return BlockSizes(
    block_q=block_q,
    block_kv_compute=block_kv_compute,
    block_kv=_fit_block_kv(problem, most_tiles, block_q, block_kv_compute),
    block_q_backward=block_q_backward,
    block_kv_compute_backward=block_kv_compute_backward,
    block_kv_backward=_fit_block_kv(
      problem, most_tiles_backward, block_q_backward, block_kv_compute_backward
    ),
  )


def _fit_block_q(problem: Problem, block_q: int, block_kv_compute: int) -> int:
  # Whole partial blocks, whose diagonal offsets are static, may extend beyond the last query; see
  # `tile_schedule.diagonal_offsets`.
  is_whole = block_q % block_kv_compute == 0 and block_q <= up(problem.queries, block_kv_compute)
  return block_q if is_whole else min(block_q, problem.queries)


def _fit_block_kv(problem: Problem, most_tiles: int, block_q: int, block_kv_compute: int) -> int:
  count = -(-problem.keys // block_kv_compute)
  if block_q % block_kv_compute == 0 and block_kv_compute % LANES == 0:
    count = up(count, block_q // block_kv_compute)
  return block_kv_compute * min(most_tiles, count)


def check(blocks: BlockSizes, problem: Problem, generation: Generation) -> None:
  """Checks that block sizes fit a call and the memory.

  Raises:
    ValueError: A size is neither a multiple of 128 nor at least the length, or the blocks do not
      fit the memory.
  """
  for field in dataclasses.fields(blocks):
    size = getattr(blocks, field.name)
    length = problem.queries if field.name.startswith("block_q") else problem.keys
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
        f"block_sizes need {needed / MIB:.1f} MiB of vector memory in the {name} pass, but a "
        f"{generation.name} core has {generation.vmem_bytes / MIB:.0f} MiB: {blocks}"
      )


def forward_bytes(problem: Problem, blocks: BlockSizes, generation: Generation) -> int:
  """Returns the vector memory of the forward pass: blocks twice, scratch and scores once.

  The compiler was seen to keep up to three float32 arrays of a step's scores in a tile. Two and a
  half are counted here, since `vmem_limit` grants more than is counted. A single block, one piece
  of code, keeps more scores at once, but not three arrays of all of them: 34 MiB, of at most 36
  (v5p, causal, 4096 queries).
  """
  width = problem.itemsize
  block_q, block_kv_compute, block_kv = blocks.block_q, blocks.block_kv_compute, blocks.block_kv
  key_columns, value_columns = up(problem.head_dim, LANES), up(problem.value_dim, LANES)
  streamed = block_q * (key_columns + value_columns) * width
  if is_transposed(problem.value_dim, generation):
    value_columns = rows(problem.value_dim, width)
  streamed += block_kv * (key_columns + value_columns) * width
  streamed += 8 * 4 * (block_q + (block_q + block_kv) * problem.has_segments)
  statistics = (2 + problem.has_segments) * LANES
  scratch = block_q * (4 * (value_columns + statistics) + 2 * key_columns * width)
  # Keys of a partial block; see `tile_schedule.diagonal_offsets`.
  keys = block_q if block_q % block_kv_compute == 0 else block_kv_compute
  scores = up(step_size(block_q, generation), 8) * up(keys, LANES)
  return 2 * streamed + scratch + 10 * scores


def is_transposed(value_dim: int, generation: Generation) -> bool:
  """Returns whether the forward pass keeps acc as [Hv, block_q].

  The columns of the product then fill the matrix unit, but weights are loaded into it instead of
  values. At T = 4096, causal, head dim 64 takes 0.79 of the cycles and 96 takes 0.88 (v5e), but 128
  takes 1.01 (v6e), where a load takes as long as it saves.
  """
  return value_dim < generation.matrix_unit <= LANES


def backward_bytes(problem: Problem, blocks: BlockSizes, generation: Generation) -> int:
  """Returns the vector memory of the backward pass, with three arrays of a chunk's scores."""
  width = problem.itemsize
  block_q, block_kv_compute = blocks.block_q_backward, blocks.block_kv_compute_backward
  block_kv = blocks.block_kv_backward
  columns = up(problem.head_dim, LANES) + up(problem.value_dim, LANES)
  streamed = (
    block_q * (2 * rows(problem.head_dim, width) * 4 + rows(problem.value_dim, width) * width)
    + block_kv * (2 * columns + rows(problem.head_dim, width)) * width
    + 8 * 4 * (2 * block_q + (block_q + block_kv) * problem.has_segments)
  )
  scratch = block_kv * columns * 4 + block_q * rows(problem.head_dim, width) * 4
  return 2 * streamed + scratch + 3 * 4 * up(block_q, LANES) * up(chunk_size(block_kv_compute), 8)


def problem_of(query, key, value, span: Span, has_segments: bool) -> Problem:
  """Returns the problem of arrays [B, T, N, H], [B, S, K, H] and [B, S, K, Hv] and a mask."""
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
  """Rounds a number of sublanes up to whole registers."""
  return up(size, 32 // itemsize)
