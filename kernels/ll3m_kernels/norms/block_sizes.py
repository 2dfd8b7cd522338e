"""Block sizes of the norms, chosen to fit a TPU core's vector memory (VMEM).

A grid step has a block of rows, [rows, D], of every array. It processes one tile of the block at a
time. A tile consists of chunks that are independent of each other.
"""

import math
from typing import Any, NamedTuple

from ll3m_kernels import block_tables
from ll3m_kernels.block_arithmetic import LANES, SUBLANES, up
from ll3m_kernels.dispatch import MIB, Generation

# Rows of the smallest bfloat16 tile; float32 needs only half.
_ROWS = 16
# A grid step has an overhead of about 400 cycles, which is significant with smaller blocks. Larger
# blocks gain nothing more.
_BLOCK_BYTES = 2 * MIB
# The first fetch and the last store are not hidden, so there are at least this many steps ...
_STEPS = 16
# ... unless that makes the blocks smaller than this.
_LEAST_BLOCK_BYTES = MIB // 2
# Elements of a tile: enough independent work to hide the latency of a sum over lanes.
_TILE = 2**18
_MOST_ROWS = 256
_CHUNKS = 4


class Limits(NamedTuple):
  """The maximum sizes of blocks and tiles.

  Attributes:
    block_bytes: Bytes of a block of one array.
    tile: Elements of a tile.
  """

  block_bytes: int
  tile: int


# The limits of calls without an entry in a table.
RULE = Limits(_BLOCK_BYTES, _TILE)


class Blocks(NamedTuple):
  """Sizes in rows: `rows` is a multiple of `tile`, `tile` of `chunk`, and `chunk` of 16."""

  rows: int
  tile: int
  chunk: int


class Problem(NamedTuple):
  """The shapes of a call that determine its memory.

  Attributes:
    num_rows: Rows of every array.
    size: Number of features, D.
    itemsize: Bytes of an element.
    num_arrays: Number of arrays [rows, D] that are read or written.
    num_weights: Number of weights [D] that are read.
    num_sums: Number of float32 arrays [8, D] that are written.
  """

  num_rows: int
  size: int
  itemsize: int
  num_arrays: int
  num_weights: int
  num_sums: int


def problem_of(x: Any, num_arrays: int, num_weights: int, num_sums: int) -> Problem:
  """Describes one pass for arrays like x, [.., D]."""
  return Problem(
    math.prod(x.shape[:-1]), x.shape[-1], x.dtype.itemsize, num_arrays, num_weights, num_sums
  )


def choose_blocks(problem: Problem, generation: Generation) -> Blocks:
  """Chooses the largest useful blocks that fit; at least 16 rows, even if they do not fit."""
  limits = block_tables.find(key_of(problem, generation), Limits) or RULE
  tile = min(max(_power_of_two(limits.tile // problem.size), _ROWS), _MOST_ROWS)
  tile = min(tile, up(problem.num_rows, _ROWS))
  row_bytes = problem.size * problem.itemsize
  wanted = max(problem.num_rows * row_bytes // _STEPS, _LEAST_BLOCK_BYTES)
  # A power of two divides the usual lengths, so no rows need a mask.
  rows = max(_power_of_two(min(wanted, limits.block_bytes) // row_bytes), tile)
  blocks = _cut(problem, rows, tile)
  while rows > _ROWS and vmem_bytes(problem, blocks) > 0.75 * generation.vmem_bytes:
    rows = max(rows // 2 // _ROWS * _ROWS, _ROWS)
    blocks = _cut(problem, rows, tile)
  return blocks


def key_of(problem: Problem, generation: Generation) -> block_tables.Key:
  """Returns the key of a pass in the block tables."""
  return block_tables.Key(
    "norm_backward" if problem.num_sums else "norm_forward",
    generation.name,
    {2: "bfloat16", 4: "float32"}[problem.itemsize],
    problem.size,
    "",
    block_tables.length_bucket(problem.num_rows),
  )


def _cut(problem: Problem, rows: int, tile: int) -> Blocks:
  """Returns blocks of at most `rows` rows, all of about the same size."""
  tile = min(tile, rows)
  chunk = max(tile // _CHUNKS // _ROWS, 1) * _ROWS
  tile = tile // chunk * chunk
  count = -(-problem.num_rows // (rows // tile * tile))
  return Blocks(up(-(-problem.num_rows // count), tile), tile, chunk)


def vmem_bytes(problem: Problem, blocks: Blocks) -> int:
  """Returns the VMEM of a pass in bytes: blocks twice, broadcast weights and tiles once."""
  columns = up(problem.size, LANES)
  streamed = problem.num_arrays * blocks.rows * problem.itemsize
  streamed += (problem.num_weights + problem.num_sums) * SUBLANES * 4
  working = (problem.num_weights * SUBLANES + blocks.tile) * 4
  return (2 * streamed + working) * columns


def _power_of_two(size: int) -> int:
  """Returns the largest power of two that does not exceed a size, or 1."""
  return 1 << max(size.bit_length() - 1, 0)
