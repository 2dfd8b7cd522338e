"""The order in which numbered examples are read, and positions in this order.

S shards share N examples. Without shuffling, shard s reads s, s + S, s + 2 S, ... With shuffling,
each number i of this sequence is first replaced by P(i), where P is a pseudo-random permutation of
all N numbers. The result then passes through a buffer of 512 numbers, from which a random one is
taken next. The draws from the buffer differ in every pass.

Both steps implement published algorithms of TensorFlow in NumPy, because earlier versions computed
this order with TensorFlow. P is `tf.random.experimental.index_shuffle`: a Feistel network with the
rounds of the block cipher Simon (https://eprint.iacr.org/2013/404), applied again to results above
N - 1. The buffer is `tf.data.Dataset.shuffle`, with draws from Philox4x32-10 (Salmon et al., 2011,
https://doi.org/10.1145/2063384.2063405). Each draw is computed from its index, so a position
consists of the pass, the number of examples taken in it, and the numbers in the buffer.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_BUFFER = 512
_MASK = 2**32 - 1
# Constants of TensorFlow: the default graph seed, and the first word of a permutation's key.
_GRAPH_SEED = 87654321
_KEY = 498247692


class NumberOrder:
  """Iterator over the example numbers of one shard."""

  def __init__(
    self,
    count: int,
    *,
    shard: int,
    num_shards: int,
    shuffle_seed: int | None,
    passes: int | None = None,
  ):
    """Starts at the beginning of the first pass.

    Args:
      count: N, the number of examples, at least S.
      shard: Index s of the shard.
      num_shards: S, the number of shards.
      shuffle_seed: Seed of the order; None for no shuffling.
      passes: Number of passes; None for no end.
    """
    self._numbers = range(shard, count, num_shards)
    self._seed, self._passes = shuffle_seed, passes
    self._last = count - 1
    self._permuted: tuple[int, list[int]] = (-1, [])
    self.start_pass(0)

  def __iter__(self) -> "NumberOrder":
    return self

  def __next__(self) -> int:
    if self._taken == len(self._numbers):
      if self._passes is not None and self._pass + 1 >= self._passes:
        raise StopIteration
      self.start_pass(self._pass + 1)
    self._taken += 1
    if self._seed is None:
      return self._numbers[self._taken - 1]
    waiting = self._waiting
    while len(waiting) < _BUFFER and self._read < len(self._numbers):
      waiting.append(self._permute(self._read))
      self._read += 1
    chosen = self._draws(self._taken - 1) % len(waiting)
    number, waiting[chosen] = waiting[chosen], waiting[0]
    waiting.popleft()
    return number

  @property
  def pass_number(self) -> int:
    """Number of the pass, from 0, to which the last returned number belongs."""
    return self._pass

  def state(self) -> dict[str, Any]:
    """Returns the position in a form that JSON can represent."""
    return {"pass": self._pass, "taken": self._taken, "waiting": list(self._waiting)}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Moves to a position that `state()` returned."""
    self.start_pass(state["pass"])
    self._taken = state["taken"]
    self._waiting.extend(state["waiting"])
    self._read = self._taken + len(self._waiting)

  def _permute(self, place: int) -> int:
    """Returns the number at a place of a shuffled pass, before the shuffle buffer."""
    part, place = divmod(place, _BUFFER)
    if self._permuted[0] != part:
      numbers = self._numbers[part * _BUFFER : (part + 1) * _BUFFER]
      self._permuted = part, permute(numbers, seed=self._seed, last=self._last).tolist()
    return self._permuted[1][place]

  def start_pass(self, number: int) -> None:
    """Moves to the beginning of a pass, counted from 0."""
    self._pass, self._taken, self._read = number, 0, 0
    self._waiting: collections.deque[int] = collections.deque()
    if self._seed is not None:
      seeds = Philox(_GRAPH_SEED, self._seed % (2**31 - 1))
      self._draws = Philox(seeds(2 * number), seeds(2 * number + 1))


class Philox:
  """Philox4x32-10, a sequence of 32-bit random numbers, each computed from its index alone."""

  def __init__(self, key: int, counter: int):
    """Seeds the sequence.

    Args:
      key: Key of 64 bits.
      counter: Upper 64 bits of the counter. The lower 64 bits are the index of a block of four
        numbers.
    """
    self._key, self._counter = (key & _MASK, key >> 32 & _MASK), (counter & _MASK, counter >> 32)
    self._block: tuple[int, tuple[int, ...]] = (-1, ())

  def __call__(self, index: int) -> int:
    """Returns the number at `index`."""
    block, place = divmod(index, 4)
    if self._block[0] != block:
      self._block = block, self._compute(block)
    return self._block[1][place]

  def _compute(self, block: int) -> tuple[int, ...]:
    counter, (k0, k1) = (block & _MASK, block >> 32, *self._counter), self._key
    for _ in range(10):
      low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
      counter = (
        high >> 32 ^ counter[1] ^ k0,
        high & _MASK,
        low >> 32 ^ counter[3] ^ k1,
        low & _MASK,
      )
      k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return counter


def permute(indices: Sequence[int], *, seed: int, last: int) -> np.ndarray:
  """Returns the places of `indices` in a pseudo-random permutation of 0 ... last."""
  places = np.array(indices, np.uint64)
  if last == 0:
    return places
  # Bits of a word, half of a block. If `last` is an even power of 2 (N = 65537, 262145, ...), the
  # order is not TensorFlow's, whose words have one bit less: it has one number twice and lacks
  # another.
  size = (max(last.bit_length(), 16) + 1) // 2
  # If N is small, a result below N takes many encryptions, so the smallest block's permutation is a
  # table.
  encrypt = (
    _table(seed & _MASK).__getitem__
    if size == 8
    else functools.partial(_encrypt, seed=seed & _MASK, size=size)
  )
  outside = np.arange(len(places))
  while len(outside):
    places[outside] = encrypt(places[outside])
    outside = outside[places[outside] > last]
  return places


@functools.lru_cache(maxsize=2)
def _table(seed: int) -> np.ndarray:
  return _encrypt(np.arange(2**16, dtype=np.uint64), seed=seed, size=8)


def _encrypt(blocks: np.ndarray, *, seed: int, size: int) -> np.ndarray:
  """Returns uint64 blocks, each of two words of `size` bits, after the cipher's rounds."""
  mask = 2**size - 1

  def rotate(word: Any, by: int) -> Any:
    return (word << by | word >> (size - by)) & mask

  k0, k1, k2 = _KEY & mask, seed & mask, 0
  k3 = 0xFFFFFFFC & mask ^ 1 ^ k0 ^ rotate(k2, size - 3) ^ rotate(k2, size - 4)
  left, right = blocks >> size, blocks & mask
  for first, second in ((k0, k1), (k2, k3)):
    left = left ^ rotate(right, 1) & rotate(right, 8) ^ rotate(right, 2) ^ first
    right = right ^ rotate(left, 1) & rotate(left, 8) ^ rotate(left, 2) ^ second
  return left << size | right
