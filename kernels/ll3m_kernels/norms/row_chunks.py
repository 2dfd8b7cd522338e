"""Chunks of rows in the norm kernels, as float32 [rows / 8, 8, D].

A vector register holds eight rows. With an axis of eight rows, weights that are broadcast over rows
fill whole registers, and sums over rows are plain additions of registers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from ll3m_kernels.block_arithmetic import SUBLANES
from ll3m_kernels.norms.block_sizes import Blocks

# Once the statistics of rows are known, their elements are processed [16, 256] at a time.
# Otherwise the compiler runs each operation over the whole chunk, which far exceeds the 64
# registers: by its estimate 1.3 times the cycles on v6e and v5e for [8192, 4096] backward.
_COLUMNS = 256
ALL = slice(None)


def for_each_chunk(blocks: Blocks, body: Callable[[Any], None]) -> None:
  """Calls `body(rows)` for the rows of every chunk of a block."""

  def do_tile(tile, carry):
    # The chunks are unrolled and independent, so each can hide the latencies of another.
    for first in range(0, blocks.tile, blocks.chunk):
      start = pl.multiple_of(tile * blocks.tile + first, blocks.chunk)
      body(pl.ds(start, blocks.chunk))
    return carry

  jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks.rows // blocks.tile), do_tile, None)


def columns(size: int) -> Iterator[slice]:
  """Yields slices of at most 256 columns that cover a row."""
  for start in range(0, size, _COLUMNS):
    yield slice(start, min(start + _COLUMNS, size))


def read(ref: Any, rows: Any, part: slice = ALL) -> Float[Array, "n 8 d"]:
  """Reads some rows and columns of a block [rows, D], as float32."""
  wide = ref[rows, part].astype(jnp.float32)
  return wide.reshape(-1, SUBLANES, wide.shape[-1])


def write(ref: Any, rows: Any, part: slice, values: Float[Array, "n 8 d"]) -> None:
  """Rounds values and writes them to some rows and columns of a block [rows, D]."""
  ref[rows, part] = values.reshape(-1, values.shape[-1]).astype(ref.dtype)


def spread(weight_ref: Any, ref: Any, offset: float = 0.0) -> None:
  """Broadcasts a weight [1, D], plus an offset, to [8, D], once for all chunks of a block."""
  ref[...] = jnp.broadcast_to(weight_ref[...].astype(jnp.float32) + offset, ref.shape)


def weight(ref: Any, part: slice = ALL) -> Float[Array, "1 8 d"]:
  """Reads columns of a weight that `spread` wrote."""
  return ref[:, part][None]


def exist(values: Float[Array, "n 8 d"], rows: Any, count: Any) -> Bool[Array, "n 8 d"]:
  """Returns a mask of the values in the first `count` rows of the block."""
  eights = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
  numbers = eights * SUBLANES + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
  return numbers < count - rows.start
