"""The softmax of a block of queries over keys that come piece by piece.

What has been added up is scaled to the largest score so far (Milakov and Gimelshein, 2018, Online
normalizer calculation for softmax). Sums over keys stay spread over the lanes until the end; only
the largest score is sought across them.

r queries, n keys, Hv head dim of the values.
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
  """What is known of a block of queries, in references.

  Attributes:
    sum_ref: of values by weights, [queries, Hv or more]; where it is turned, [Hv or more, queries].
    largest_ref: the largest scores, [queries, 128], the same in every lane.
    total_ref: of the weights, [queries, 128], yet to be summed over the lanes.
    is_turned: see `block_sizes.is_turned`.
    scale: multiplies differences of scores to make powers of two of them.
  """

  sum_ref: Any
  largest_ref: Any
  total_ref: Any
  is_turned: bool
  scale: float

  def start(self, rows: slice) -> None:
    """Prepares some queries, which have seen nothing."""
    count = rows.stop - rows.start
    size = self.sum_ref.shape[0 if self.is_turned else 1]
    shape = (size, count) if self.is_turned else (count, size)
    self.sum_ref[self.of_sum(rows)] = jnp.zeros(shape, jnp.float32)
    # Never as low as what is masked, so that this vanishes even where nothing is visible.
    self.largest_ref[rows, :] = jnp.full((count, LANES), 0.5 * specs.MASKED, jnp.float32)
    self.total_ref[rows, :] = jnp.zeros((count, LANES), jnp.float32)

  def finish(self, rows: slice, output_ref: Any, log_sum_exp_ref: Any) -> None:
    """Writes what some queries get to [1, 1, queries, Hv] and [1, 1, 1, queries]."""
    total = jnp.sum(self.total_ref[rows, :], axis=1, keepdims=True)
    total_row = to_row(jnp.broadcast_to(total, (total.shape[0], LANES)))
    divisor = total_row if self.is_turned else total
    output = self.sum_ref[self.of_sum(rows)] * (1.0 / jnp.where(divisor == 0.0, 1.0, divisor))
    output = output.T if self.is_turned else output
    output_ref[0, 0, rows, :] = output[:, : output_ref.shape[3]].astype(output_ref.dtype)
    is_empty = total_row == 0.0
    log_sum_exp = to_row(self.largest_ref[rows, :]) * (self.scale * _LOG_2)
    log_sum_exp += jnp.log(jnp.where(is_empty, 1.0, total_row))
    log_sum_exp_ref[0, 0, :, rows] = jnp.where(is_empty, specs.MASKED, log_sum_exp)

  def of_sum(self, rows: slice) -> tuple[slice, slice]:
    """Returns where the sums of some queries stand."""
    return (slice(None), rows) if self.is_turned else (rows, slice(None))

  def power(self, x: Array) -> Array:
    """Returns the weights that differences of scores make."""
    return jnp.exp2(x if self.scale == 1.0 else x * self.scale)


class Update:
  """Adds to a softmax what some queries see in pieces whose scores are all known."""

  def __init__(self, softmax: Softmax, rows: slice, scores: Mapping[int, Float[Array, "r n"]]):
    """Finds the largest score.

    Args:
      softmax: of the block.
      rows: the queries.
      scores: by the number of the piece.
    """
    self._softmax, self._rows, self._scores = softmax, rows, scores
    before = softmax.largest_ref[rows, :]
    self._largest = jnp.maximum(before, _largest(scores.values()))
    self._shrink = softmax.power(before - self._largest)
    self._total = self._shrink * softmax.total_ref[rows, :]
    self._sum = None

  @property
  def rows(self) -> slice:
    """The queries."""
    return self._rows

  def meets(self, piece: int) -> bool:
    """Returns whether there are scores of a piece."""
    return piece in self._scores

  def weights(self, piece: int) -> Float[Array, "r n"]:
    """Returns the weights of a piece's keys, once, as they are added up."""
    scores = self._scores[piece]
    weights = self._softmax.power(scores - widen(self._largest, scores.shape[1]))
    self._total += _narrow(weights)
    return weights

  def add(self, product: Array) -> None:
    """Adds values by their weights, [r, Hv], or [Hv, r] where that is turned."""
    self._sum = product if self._sum is None else self._sum + product

  def store(self) -> None:
    """Writes what is known now of these queries."""
    softmax, rows = self._softmax, self._rows
    softmax.largest_ref[rows, :] = self._largest
    softmax.total_ref[rows, :] = self._total
    before = softmax.sum_ref[softmax.of_sum(rows)]
    shrink = to_row(self._shrink) if softmax.is_turned else widen(self._shrink, before.shape[1])
    softmax.sum_ref[softmax.of_sum(rows)] = shrink * before + self._sum


def widen(x: Array, size: int) -> Array:
  """Repeats [r, 128], the same in every lane, to [r, size]."""
  return jnp.concatenate([x] * -(-size // LANES), axis=1)[:, :size]


def to_row(x: Float[Array, "r 128"]) -> Float[Array, "1 r"]:
  """Turns a column that stands in every lane into a row: cheaper than to transpose it."""
  parts = []
  for start in range(0, x.shape[0], LANES):
    part = x[start : start + LANES]
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, part.shape, axis) for axis in range(2))
    turned = jnp.sum(jnp.where(row == lane, part, 0.0), axis=0, keepdims=True)
    parts.append(turned[:, : part.shape[0]])
  return jnp.concatenate(parts, axis=1)


def _largest(parts: Iterable[Float[Array, "r n"]]) -> Float[Array, "r 1"]:
  narrow = []
  for x in parts:
    *whole, rest = _lanes(x)
    narrow += whole if rest is None else [*whole, jnp.max(rest, axis=1, keepdims=True)]
  return jnp.max(functools.reduce(jnp.maximum, narrow), axis=1, keepdims=True)


def _narrow(x: Float[Array, "r n"]) -> Float[Array, "r 128"]:
  """Adds up n numbers to 128 whose sum is theirs."""
  *narrow, rest = _lanes(x)
  if rest is not None:
    lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    narrow.append(jnp.where(lane == 0, jnp.sum(rest, axis=1, keepdims=True), 0.0))
  return functools.reduce(jnp.add, narrow)


def _lanes(x: Float[Array, "r n"]) -> Iterator[Array | None]:
  """Yields [r, 128] until there is less, and then that; None if that is nothing."""
  whole = x.shape[1] // LANES * LANES
  yield from (x[:, start : start + LANES] for start in range(0, whole, LANES))
  yield x[:, whole:] if whole < x.shape[1] else None
