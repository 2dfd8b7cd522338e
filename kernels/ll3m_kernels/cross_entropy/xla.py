"""The loss over a vocabulary that is processed in chunks, in plain jnp.

N tokens, D model, V vocabulary. Splitting the vocabulary rather than the tokens completes each
chunk of the head's gradient at once; only the gradient of the hidden states is summed over chunks,
in float32. The backward pass recomputes the chunks' logits (the idea of Wijmans et al., "Cut Your
Losses", 2024, without their filtering).

The forward pass sums exp(logits - reference), where the reference is known before the chunk: the
largest logit so far. Subtracting the chunk's own maximum would need its logits twice and therefore
in memory. With a known reference, the TPU compiler fuses the product, the exponential and all three
reductions, and no logits leave the chip.

Why there is no kernel: the compiler's static profile estimates that one would gain little. The
estimates are for 8192 tokens in bfloat16 with D = 2048, in units of one product of a chunk's size
at peak. On a v5e, a chunk's forward and backward pass takes 6.3; the minimum is 6 passes of the
matrix unit (the logits twice; each of the gradients' two products in two passes, since the logits'
cotangent is float32). A Pallas forward pass of 40 lines takes 1.06 on a v5e, and this one 1.05. On
a v6e they take 1.25 and 1.48; the difference is 3% of both passes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ll3m_kernels.block_arithmetic import LANES
from ll3m_kernels.sharding import Sharding, vary_alike
from ll3m_kernels.soft_cap import soft_cap

# Maximum columns of a chunk, and maximum logits (128 MiB of them). Chunks of fewer than 1024
# columns would be too narrow to hide the sums of the hidden states' gradient behind their products.
_MOST_COLUMNS = 4096
_MOST_LOGITS = 2**25
_FEWEST_COLUMNS = 1024

# How far a logit may exceed the reference: the sum of a chunk's exp(75) does not overflow float32,
# and exp(-75), which rescales it, is not subnormal (TPUs flush subnormal numbers to 0).
_REACH = 75.0
# A reference below all finite logits, instead of -inf, because -inf - -inf is NaN.
_LEAST_REFERENCE = float(np.finfo(np.float32).min)


class Options(NamedTuple):
  """The static options of a call; hashable, so they can be a static argument.

  Attributes:
    head_layout: "dv" or "vd".
    logits_soft_cap: Cap of the logits, which become cap * tanh(logits / cap).
    z_loss: Weight of log(Z)^2.
    sharding: Sharding of the arrays; None on one device.
  """

  head_layout: str
  logits_soft_cap: float | None
  z_loss: float
  sharding: Sharding | None


class Sums(NamedTuple):
  """The forward pass's running sums and maxima over the chunks so far, per token.

  Attributes:
    largest: Largest logit.
    reference: Maximum of the largest logit and the initial reference; finite.
    total: Sum of exp(logits - reference).
    reach: Largest excess of a logit over the reference of its chunk.
    picked: Logit of the label; 0 before the label's chunk.
  """

  largest: Float[Array, " N"]
  reference: Float[Array, " N"]
  total: Float[Array, " N"]
  reach: Float[Array, " N"]
  picked: Float[Array, " N"]


def forward(
  options: Options,
  hidden: Float[Array, "N D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  bias: Float[Array, " V"] | None,
  labels: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
  """Returns log Z, the label's logit and the largest logit of every token, in float32.

  All three are -inf for a token whose logits are all -inf.
  """
  vocabulary = _Vocabulary(options, head, bias)

  def add_chunk(start: Any, size: int, sums: Sums) -> Sums:
    columns = vocabulary.columns(start, size)
    logits, _ = _logits(options, hidden, columns)
    total = jnp.sum(jnp.exp(logits - sums.reference[:, None]), axis=1)
    largest = jnp.max(logits, axis=1)
    reference = jnp.maximum(sums.reference, largest)
    is_label = labels[:, None] == columns.index[None]
    return Sums(
      largest=jnp.maximum(sums.largest, largest),
      reference=reference,
      total=(sums.total + total) * jnp.exp(sums.reference - reference),
      reach=jnp.maximum(sums.reach, largest - sums.reference),
      picked=sums.picked + jnp.sum(jnp.where(is_label, logits, 0.0), axis=1),
    )

  def sum_chunks(reference: Float[Array, " N"]) -> Sums:
    zero = jnp.zeros_like(reference)
    reference = jnp.maximum(reference, _LEAST_REFERENCE)
    sums = Sums(jnp.full_like(reference, -jnp.inf), reference, zero, zero, zero)
    return vocabulary.for_each_chunk(len(hidden), add_chunk, sums)

  # The first reference is the largest of a few logits. If another logit exceeds it by more than
  # _REACH, the chunks are summed again, starting from the largest logit, which is then known. This
  # is one loop, so that `sum_chunks` is compiled once.
  few, _ = _logits(options, hidden, vocabulary.columns(np.int32(0), vocabulary.fewest))
  guess = jnp.max(few, axis=1)
  zero = jnp.zeros_like(guess)
  sums = jax.lax.while_loop(
    lambda sums: jnp.any(sums.reach > _REACH),
    lambda sums: sum_chunks(sums.largest),
    Sums(guess, guess, zero, jnp.full_like(guess, jnp.inf), zero),
  )
  return sums.reference + jnp.log(sums.total), sums.picked, sums.largest


def backward(
  options: Options,
  hidden: Float[Array, "N D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  bias: Float[Array, " V"] | None,
  labels: Int[Array, " N"],
  log_z: Float[Array, " N"],
  softmax_bar: Float[Array, " N"],
  label_bar: Float[Array, " N"],
) -> tuple[Array, Array, Array | None]:
  """Returns the cotangents of hidden, head and bias, in the dtypes of hidden, head and bias.

  Args:
    options: Options of the call.
    hidden: See `forward`.
    head: See `forward`.
    bias: See `forward`.
    labels: See `forward`.
    log_z: First result of `forward`.
    softmax_bar: Factor of the softmax in the logits' cotangent.
    label_bar: Value that is subtracted from the logits' cotangent at the label.
  """
  vocabulary = _Vocabulary(options, head, bias)
  is_dv = options.head_layout == "dv"

  def add_chunk(start, size, bars):
    hidden_bar, head_bar, bias_bar = bars
    columns = vocabulary.columns(start, size)
    logits, slope = _logits(options, hidden, columns)
    is_label = labels[:, None] == columns.index[None]
    logits_bar = jnp.exp(logits - log_z[:, None]) * softmax_bar[:, None]
    logits_bar = logits_bar - jnp.where(is_label, label_bar[:, None], 0.0)  # [N, c]
    if slope is not None:
      logits_bar = logits_bar * slope
    hidden_bar = hidden_bar + _dot(logits_bar, columns.head, (1, 1 if is_dv else 0))
    operands = (hidden, logits_bar) if is_dv else (logits_bar, hidden)
    head_bar = vocabulary.put(head_bar, vocabulary.axis, start, _dot(*operands, (0, 0)))
    if bias_bar is not None:
      bias_bar = vocabulary.put(bias_bar, 1, start, jnp.sum(logits_bar, axis=0))
    return hidden_bar, head_bar, bias_bar

  zeros = (
    jnp.zeros(hidden.shape, jnp.float32),
    jnp.zeros_like(vocabulary.head),
    None if bias is None else jnp.zeros_like(vocabulary.bias),
  )
  hidden_bar, head_bar, bias_bar = vocabulary.for_each_chunk(
    len(hidden), add_chunk, tuple(vary_alike(hidden, *zeros)[1:])
  )
  return (
    hidden_bar.astype(hidden.dtype),
    head_bar.reshape(head.shape),
    None if bias is None else bias_bar.reshape(bias.shape),
  )


class _Columns(NamedTuple):
  """A chunk's columns of the logits.

  Attributes:
    head: Weights, [D, c] or [c, D], in the head's layout.
    bias: Bias of each column, if any.
    index: Index of each column in the vocabulary.
  """

  head: Array
  bias: Float[Array, " c"] | None
  index: Int[Array, " c"]


class _Vocabulary:
  """The head and its bias, processed in chunks.

  The vocabulary is viewed as P stripes of V / P columns, and a chunk takes the same columns of each
  stripe. On a mesh, P is the number of devices that the vocabulary is split over, so each device
  holds its part of every chunk. Elsewhere, P is 1.

  Attributes:
    head: Head as [D, P, V / P] or [P, V / P, D].
    axis: Axis of V / P in `head`.
    bias: Bias as [P, V / P], or None.
    fewest: Smallest number of columns of a stripe that is worth processing.
  """

  def __init__(self, options: Options, head: Array, bias: Array | None):
    size, sharding = head.shape[options.head_layout.index("v")], options.sharding
    stripes = 1 if sharding is None or size % sharding.head_shards else sharding.head_shards
    self._split = (stripes, size // stripes)
    self.fewest = min(LANES, self._split[1])
    self.axis = 1 + options.head_layout.index("v")
    shape = list(head.shape)
    shape[self.axis - 1 : self.axis] = self._split
    self.head = head.reshape(shape)
    self.bias = None if bias is None else bias.reshape(self._split)
    if stripes > 1:
      spec = [PartitionSpec.UNCONSTRAINED] * 3
      spec[self.axis - 1] = sharding.head_axis
      placement = NamedSharding(sharding.mesh, PartitionSpec(*spec))
      self.head = jax.lax.with_sharding_constraint(self.head, placement)

  def for_each_chunk[T](self, tokens: int, body: Callable[[Any, int, T], T], carry: T) -> T:
    """Calls `carry = body(start, size, carry)` for chunks of one size, and once for any remainder.

    This is a loop, because unrolling 32 chunks takes the TPU compiler a minute. Besides, compilers
    that recognise the same unrolled logits in both passes keep those of all chunks in memory.

    Args:
      tokens: Number of tokens N, which limits a chunk's size.
      body: Function of the first column within each stripe (int32), the number of columns, and the
        carry.
      carry: Initial carry.
    """
    stripes, length = self._split
    most = min(_MOST_COLUMNS, max(_MOST_LOGITS // max(tokens, 1), _FEWEST_COLUMNS))
    size = _chunk_size(length, max(most // stripes, 1))

    def step(i, carry):
      return body(i * np.int32(size), size, carry)

    carry = jax.lax.fori_loop(np.int32(0), np.int32(length // size), step, carry)
    rest = length % size
    return body(np.int32(length - rest), rest, carry) if rest else carry

  def columns(self, start: Any, size: int) -> _Columns:
    """Returns `size` columns of each stripe."""
    stripes, length = self._split

    def take(array, axis):
      part = jax.lax.dynamic_slice_in_dim(array, start, size, axis=axis)
      return part.reshape(*part.shape[: axis - 1], stripes * size, *part.shape[axis + 1 :])

    first = start + jnp.arange(stripes, dtype=jnp.int32) * np.int32(length)
    return _Columns(
      head=take(self.head, self.axis),
      bias=None if self.bias is None else take(self.bias, 1),
      index=(first[:, None] + jnp.arange(size, dtype=jnp.int32)[None]).reshape(-1),
    )

  def put(self, array: Array, axis: int, start: Any, part: Float[Array, "..."]) -> Array:
    """Writes the columns from `start` on into an array of the head's or bias's shape."""
    shape = (
      *array.shape[:axis],
      part.size * self._split[1] // array.size,
      *array.shape[axis + 1 :],
    )
    part = part.reshape(shape).astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=axis)


def _chunk_size(length: int, most: int) -> int:
  """Returns a chunk's columns: a multiple of the lanes, with no remainder if that costs little."""
  if length <= most:
    return length
  most = max(most - most % LANES, LANES)
  even = (size for size in range(most, most // 2, -LANES) if length % size == 0)
  return next(even, most)


def _logits(
  options: Options, hidden: Float[Array, "N D"], columns: _Columns
) -> tuple[Float[Array, "N c"], Float[Array, "N c"] | None]:
  """Returns logits, and the slope of their soft cap, if any."""
  logits = _dot(hidden, columns.head, (1, options.head_layout.index("d")))
  if columns.bias is not None:
    logits = logits + columns.bias.astype(jnp.float32)[None]
  if options.logits_soft_cap is None:
    return logits, None
  return soft_cap(logits, options.logits_soft_cap)


def _dot(left: Array, right: Array, axes: tuple[int, int]) -> Float[Array, "a b"]:
  """Multiplies matrices in float32, which on a TPU needs an explicit precision.

  Products of two bfloat16 operands are exact. A float32 operand beside a bfloat16 one is split into
  a sum of two bfloat16 numbers. (HIGH splits both operands; the compiler drops the pass for the
  half that is 0.) Two float32 operands are split into sums of three.
  """
  narrow = [x.dtype == jnp.bfloat16 for x in (left, right)]
  precision = None
  if not all(narrow):
    precision = jax.lax.Precision.HIGH if any(narrow) else jax.lax.Precision.HIGHEST
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
  return jax.lax.dot_general(
    left,
    right,
    (((axes[0],), (axes[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
