"""The online softmax of a block of queries, over keys that arrive in pieces.

The state of a query is (m, l, acc): the maximum of its scores so far, the sum of its weights
exp(score - m), and the sum of the values times their weights. A new piece of keys updates it by
(Milakov and Gimelshein, 2018, Online normalizer calculation for softmax)

    m_next = max(m_prev, max(scores))      alpha  = exp(m_prev - m_next)
    weights = exp(scores - m_next)         l_next = alpha * l_prev + sum(weights)
                                         acc_next = alpha * acc_prev + weights @ values

l is kept as 128 partial sums, one per lane, and is summed over the lanes only in `finish`; only m
needs a reduction over the lanes in every update.

Dimensions: r queries, n keys, Hv head dim of the values.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m_kernels.attention import spec as specs
from ll3m_kernels.block_arithmetic import LANES

_LOG_2 = math.log(2.0)


class Softmax(NamedTuple):
  """References to the state of a block of queries.

  Attributes:
    acc_ref: Sum of the values times their weights, [block_q, Hv or more]; transposed,
      [Hv or more, block_q].
    m_ref: Maximum of the scores, [block_q, 128], equal in all lanes.
    l_ref: Sum of the weights, [block_q, 128], as partial sums per lane.
    is_transposed: Whether `acc_ref` is transposed; see `block_sizes.is_transposed`.
    scale: Factor of score differences before they become exponents of 2.
  """

  acc_ref: Any
  m_ref: Any
  l_ref: Any
  is_transposed: bool
  scale: float

  def start(self, rows: slice) -> None:
    """Initialises the state of some queries."""
    count = rows.stop - rows.start
    size = self.acc_ref.shape[0 if self.is_transposed else 1]
    shape = (size, count) if self.is_transposed else (count, size)
    self.acc_ref[self.acc_index(rows)] = jnp.zeros(shape, jnp.float32)
    # Above MASKED, so that the weights of masked scores are 0 even where all scores are masked.
    self.m_ref[rows, :] = jnp.full((count, LANES), 0.5 * specs.MASKED, jnp.float32)
    self.l_ref[rows, :] = jnp.zeros((count, LANES), jnp.float32)

  def finish(self, rows: slice, output_ref: Any, log_sum_exp_ref: Any) -> None:
    """Writes output [1, 1, block_q, Hv] and log-sum-exp [1, 1, 1, block_q] of some queries."""
    l = jnp.sum(self.l_ref[rows, :], axis=1, keepdims=True)  # [r, 1]
    l_row = to_row(jnp.broadcast_to(l, (l.shape[0], LANES)))  # [1, r]
    divisor = l_row if self.is_transposed else l
    output = self.acc_ref[self.acc_index(rows)] * (1.0 / jnp.where(divisor == 0.0, 1.0, divisor))
    output = output.T if self.is_transposed else output
    output_ref[0, 0, rows, :] = output[:, : output_ref.shape[3]].astype(output_ref.dtype)
    is_empty = l_row == 0.0
    log_sum_exp = to_row(self.m_ref[rows, :]) * (self.scale * _LOG_2)
    log_sum_exp += jnp.log(jnp.where(is_empty, 1.0, l_row))
    log_sum_exp_ref[0, 0, :, rows] = jnp.where(is_empty, specs.MASKED, log_sum_exp)

  def acc_index(self, rows: slice) -> tuple[slice, slice]:
    """Returns the index of some queries in `acc_ref`."""
    return (slice(None), rows) if self.is_transposed else (rows, slice(None))

  def exp2(self, x: Array) -> Array:
    """Returns 2 ** (scale * x)."""
    return jnp.exp2(x if self.scale == 1.0 else x * self.scale)


class Update:
  """One update of the state of some queries, by pieces of keys whose scores are all known.

  Call `take_weights` once per piece, `add` its product with the values, and then `store`.
  """

  def __init__(self, softmax: Softmax, rows: slice, scores: Mapping[int, Float[Array, "r n"]]):
    """Computes m_next and alpha.

    Args:
      softmax: The state of the block.
      rows: The queries to update.
      scores: Their scores, by number of the piece.
    """
    self._softmax, self._rows, self._scores = softmax, rows, scores
    m_prev = softmax.m_ref[rows, :]  # [r, 128]
    self._m_next = jnp.maximum(m_prev, _row_max(scores.values()))
    self._alpha = softmax.exp2(m_prev - self._m_next)
    self._l_next = self._alpha * softmax.l_ref[rows, :]
    self._product = None

  @property
  def rows(self) -> slice:
    """The queries to update."""
    return self._rows

  def has_piece(self, piece: int) -> bool:
    """Returns whether the update includes the scores of a piece."""
    return piece in self._scores

  def take_weights(self, piece: int) -> Float[Array, "r n"]:
    """Returns the weights of a piece's keys and adds them to l.

    It must be called exactly once per piece, before `store`.
    """
    scores = self._scores[piece]
    weights = self._softmax.exp2(scores - widen(self._m_next, scores.shape[1]))
    self._l_next += _sum_to_lanes(weights)
    return weights

  def add(self, product: Array) -> None:
    """Adds weights times values, [r, Hv], or [Hv, r] where acc is transposed."""
    self._product = product if self._product is None else self._product + product

  def store(self) -> None:
    """Writes m, l and acc."""
    softmax, rows = self._softmax, self._rows
    softmax.m_ref[rows, :] = self._m_next
    softmax.l_ref[rows, :] = self._l_next
    acc_prev = softmax.acc_ref[softmax.acc_index(rows)]
    alpha = to_row(self._alpha) if softmax.is_transposed else widen(self._alpha, acc_prev.shape[1])
    softmax.acc_ref[softmax.acc_index(rows)] = alpha * acc_prev + self._product


def widen(x: Array, size: int) -> Array:
  """Widens [r, 128], equal in all lanes, to [r, size]."""
  return jnp.concatenate([x] * -(-size // LANES), axis=1)[:, :size]


def to_row(x: Float[Array, "r 128"]) -> Float[Array, "1 r"]:
  """Turns a column, equal in all lanes, into a row; this is cheaper than a transpose."""
  parts = []
  for start in range(0, x.shape[0], LANES):
    part = x[start : start + LANES]
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, part.shape, axis) for axis in range(2))
    diagonal = jnp.sum(jnp.where(row == lane, part, 0.0), axis=0, keepdims=True)  # [1, 128]
    parts.append(diagonal[:, : part.shape[0]])
  return jnp.concatenate(parts, axis=1)


def _row_max(parts: Iterable[Float[Array, "r n"]]) -> Float[Array, "r 1"]:
  narrow = []
  for x in parts:
    *whole, rest = _split_lanes(x)
    narrow += whole if rest is None else [*whole, jnp.max(rest, axis=1, keepdims=True)]
  return jnp.max(functools.reduce(jnp.maximum, narrow), axis=1, keepdims=True)


def _sum_to_lanes(x: Float[Array, "r n"]) -> Float[Array, "r 128"]:
  """Reduces the numbers of a row to 128 partial sums."""
  *narrow, rest = _split_lanes(x)
  if rest is not None:
    lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    narrow.append(jnp.where(lane == 0, jnp.sum(rest, axis=1, keepdims=True), 0.0))
  return functools.reduce(jnp.add, narrow)


def _split_lanes(x: Float[Array, "r n"]) -> Iterator[Array | None]:
  """Yields slices [r, 128], and then the remaining columns, or None if there are none."""
  whole = x.shape[1] // LANES * LANES
  yield from (x[:, start : start + LANES] for start in range(0, whole, LANES))
  yield x[:, whole:] if whole < x.shape[1] else None
