"""Rotary embeddings on a TPU: queries and keys are read once and written once.

Arrays have tokens last, [B, heads, H, T]. A pair (x[i], x[i + R/2]) is then in two rows, which need
no shifts or selects. A head dim that is not a multiple of 128 wastes no lanes. The table of angles
is the product of a row of positions and a column of frequencies. Projections write this layout, and
attention's backward pass reads queries and one copy of the keys in it. Its other products need
tokens in rows, for which XLA transposes both once.

A grid step has a block of tokens and some of their heads. The table is computed in the first step
of a block of tokens and stays in vector memory for the others.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ll3m_kernels.block_arithmetic import LANES, even, up
from ll3m_kernels.dispatch import MIB
from ll3m_kernels.rotary.angles import Rotation, cos_sin, frequencies
from ll3m_kernels.sharding import result

# Bytes of a grid step's queries and keys. Two input and two output blocks fit in the 16 MiB of a
# v4. Larger blocks do not pay on other TPUs either: the first fetch and the last store are not
# hidden.
_BLOCK_BYTES = 5 * MIB // 2
_VMEM_BYTES = 16 * MIB
_TOKENS = 512
# Blocks whose positions are fetched together: a fetch of any size costs at least 400 cycles.
_BLOCKS_OF_POSITIONS = 64
# Heads that are rotated side by side, in 4 to 5% fewer cycles than one after the other.
_UNROLL = 4


class Blocks(NamedTuple):
  """The block of a grid step.

  Attributes:
    tokens: Number of tokens: a multiple of 128, or all.
    query_heads: Number of query heads.
    key_heads: Number of key heads.
    steps: Number of blocks of heads.
  """

  tokens: int
  query_heads: int
  key_heads: int
  steps: int


def blocks_of(rotation: Rotation, query: Any, key: Any) -> tuple[Blocks, int]:
  """Returns the blocks of queries and keys, and their VMEM in bytes."""
  _, length = _rows_of_tokens(query)
  blocks = _choose_blocks(length, query, key)
  tokens, half = up(blocks.tokens, LANES), up(rotation.rotary_dim // 2, 8)
  streamed = 2 * _block_bytes(query, key, blocks)
  small = 4 * (tokens * _fetched(length, blocks) + 2 * LANES * half)
  # The table, and the heads that are rotated side by side, in float32.
  working = 4 * tokens * (2 * half + _UNROLL * up(query.shape[3], 8))
  return blocks, 2 * (streamed + small) + working


def rotate(
  rotation: Rotation,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
  """Rotates queries and keys; see `rotary_embedding`."""
  shapes = query.shape, key.shape
  batch, length = _rows_of_tokens(query)
  query, key = (x.reshape(batch, length, *x.shape[2:]) for x in (query, key))
  positions = positions.reshape(batch, 1, length)
  head_dim = query.shape[3]
  blocks, _ = blocks_of(rotation, query, key)
  token_blocks, fetched = pl.cdiv(length, blocks.tokens), _fetched(length, blocks)

  def of_heads(count, total):
    last = pl.cdiv(total, count) - 1

    def place(b, i, j):
      # If there are more steps than blocks, the last block stays and is rotated again.
      return b, j if last == blocks.steps - 1 else jnp.minimum(j, last), 0, i

    return pl.BlockSpec((1, count, head_dim, blocks.tokens), place)

  def place_of_positions(b, i, j):
    # Written as a constant where possible, because a constant index costs nothing to check.
    return b, 0, 0 if fetched == token_blocks else jax.lax.div(i, np.int32(fetched))

  column = pl.BlockSpec((rotation.rotary_dim // 2, 1), lambda b, i, j: (0, 0))
  arrays = [query.transpose(0, 2, 3, 1), key.transpose(0, 2, 3, 1)]
  block_specs = [
    of_heads(blocks.query_heads, query.shape[2]),
    of_heads(blocks.key_heads, key.shape[2]),
  ]
  table = pltpu.VMEM((rotation.rotary_dim // 2, blocks.tokens), jnp.float32)
  rotated = pl.pallas_call(
    functools.partial(_kernel, rotation, blocks.tokens, fetched),
    grid=(batch, token_blocks, blocks.steps),
    in_specs=[
      pl.BlockSpec((1, 1, fetched * blocks.tokens), place_of_positions),
      column,
      column,
      *block_specs,
    ],
    out_specs=block_specs,
    out_shape=[result(x.shape, x.dtype, x) for x in arrays],
    scratch_shapes=[table, table],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    ),
    name="rotary_embedding_inverse" if rotation.is_backward else "rotary_embedding",
  )(positions, *(jnp.asarray(x)[:, None] for x in frequencies(rotation)), *arrays)
  query, key = (
    x.transpose(0, 3, 1, 2).reshape(shape) for x, shape in zip(rotated, shapes, strict=True)
  )
  return query, key


def _kernel(rotation, tokens, fetched, positions_ref, whole_ref, rest_ref, *refs):
  query_ref, key_ref, rotated_query_ref, rotated_key_ref, cos_ref, sin_ref = refs
  half = rotation.rotary_dim // 2
  # Read outside the condition, because jax's plain interpreter does not support it inside.
  token_block = pl.program_id(1)

  @pl.when(pl.program_id(2) == 0)
  def _():
    if fetched == 1:
      positions = positions_ref[0]  # [1, tokens]
    else:
      start = jax.lax.rem(token_block, np.int32(fetched)) * tokens
      positions = positions_ref[0, :, pl.ds(pl.multiple_of(start, LANES), tokens)]
    cos_ref[...], sin_ref[...] = cos_sin(rotation, positions, whole_ref[...], rest_ref[...])

  def turn(source_ref, target_ref):
    def turn_head(head, carry):
      x = source_ref[0, head].astype(jnp.float32)  # [H, tokens]
      first, second = x[:half], x[half : 2 * half]
      cos, sin = cos_ref[...], sin_ref[...]
      parts = [first * cos - second * sin, second * cos + first * sin]
      if x.shape[0] > 2 * half:
        parts.append(x[2 * half :])
      target_ref[0, head] = jnp.concatenate(parts).astype(target_ref.dtype)
      return carry

    heads = source_ref.shape[1]
    jax.lax.fori_loop(np.int32(0), np.int32(heads), turn_head, None, unroll=min(_UNROLL, heads))

  turn(query_ref, rotated_query_ref)
  turn(key_ref, rotated_key_ref)


def _rows_of_tokens(query: Any) -> tuple[int, int]:
  """Returns batch and length, with short rows merged into one, since tokens fill the lanes."""
  batch, length = query.shape[:2]
  return (batch, length) if length >= LANES else (1, batch * length)


def _choose_blocks(length: int, query: Any, key: Any) -> Blocks:
  num_heads, num_kv_heads = query.shape[2], key.shape[2]
  whole = Blocks(even(length, 2 * _TOKENS), num_heads, num_kv_heads, 1)
  if _block_bytes(query, key, whole) <= _BLOCK_BYTES:
    return whole
  tokens = even(length, _TOKENS)
  for parts in range(1, max(num_heads, num_kv_heads) + 1):
    heads, kv_heads = pl.cdiv(num_heads, parts), pl.cdiv(num_kv_heads, parts)
    steps = max(pl.cdiv(num_heads, heads), pl.cdiv(num_kv_heads, kv_heads))
    blocks = Blocks(tokens, heads, kv_heads, steps)
    if _block_bytes(query, key, blocks) <= _BLOCK_BYTES:
      break
  return blocks


def _fetched(length: int, blocks: Blocks) -> int:
  """Returns the number of blocks whose positions are fetched together."""
  return min(pl.cdiv(length, blocks.tokens), _BLOCKS_OF_POSITIONS)


def _block_bytes(query: Any, key: Any, blocks: Blocks) -> int:
  tokens = up(blocks.tokens, LANES)
  return sum(
    heads * up(x.shape[3], 32 // x.dtype.itemsize) * tokens * x.dtype.itemsize
    for x, heads in ((query, blocks.query_heads), (key, blocks.key_heads))
  )
