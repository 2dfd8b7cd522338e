"""The loss over a vocabulary taken in chunks, in plain jnp.

N tokens, D model, V vocabulary. The vocabulary, not the tokens, is what is cut: then each chunk of
the head's gradient is finished at once, and only the hidden states' gradient has to be summed over
chunks, in float32. The chunks' logits are computed again in the backward pass (the idea of Wijmans
et al., "Cut Your Losses", 2024, without their filtering).

The forward pass sums exp(logits - reference) with a reference that is known before the chunk: the
largest logit so far. Subtracting the chunk's own maximum would need its logits twice, and so in
memory; this way the TPU compiler makes product, exponential and all three reductions one fusion,
and no logits leave the chip.

Why there is no kernel: by the compiler's static profile, with 8192 tokens in bfloat16 and D = 2048,
a chunk's forward and backward pass takes 6.3 times as long on a v5e as one product of its size at
peak, where the six passes of the matrix unit that it cannot do without take 6 (the logits twice;
each of the gradients' two products in two passes, since the logits' cotangent is float32). A Pallas
forward pass of 40 lines reads 1.06 such products on a v5e, where this one reads 1.05; on a v6e 1.25
against 1.48, which is 3% of both passes.
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

# A chunk has at most so many columns, and logits (128 MiB of them), unless it would be too narrow
# for the sums of the hidden states' gradient to hide behind its products.
_MOST_COLUMNS = 4096
_MOST_LOGITS = 2**25
_FEWEST_COLUMNS = 1024

# How far a logit may exceed the reference: sums of a chunk's exp(75) stay below float32's largest
# number, and exp(-75), which rescales them, is not subnormal (TPUs round these to 0).
_REACH = 75.0
# Below any logit but -inf, for whose sake it is: the difference of two infinities is no number.
_LEAST_REFERENCE = float(np.finfo(np.float32).min)


class Options(NamedTuple):
  """What does not change with the data: hashable, so that it may be a static argument.

  Attributes:
    head_layout: "dv" or "vd".
    logits_soft_cap: logits become cap * tanh(logits / cap).
    z_loss: weight of log(Z)^2.
    sharding: of the arrays; None on one device.
  """

  head_layout: str
  logits_soft_cap: float | None
  z_loss: float
  sharding: Sharding | None


class Sums(NamedTuple):
  """What the forward pass knows of the logits so far, per token.

  Attributes:
    largest: the largest logit.
    reference: the same, or what the walk began with, whichever is larger; finite.
    total: sum of exp(logits - reference).
    reach: how far a logit exceeded the reference that it met.
    picked: the label's logit; 0 before it was met.
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
  """Returns every token's log Z, its label's logit, and its largest logit, in float32.

  All are -inf where all logits are.
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

  def walk(reference: Float[Array, " N"]) -> Sums:
    zero = jnp.zeros_like(reference)
    reference = jnp.maximum(reference, _LEAST_REFERENCE)
    sums = Sums(jnp.full_like(reference, -jnp.inf), reference, zero, zero, zero)
    return vocabulary.for_each_chunk(len(hidden), add_chunk, sums)

  # A few logits tell where the others lie. Should one lie beyond all reason, walk again from what
  # is then known to be the largest: one loop, so that the walk is compiled once.
  few, _ = _logits(options, hidden, vocabulary.columns(np.int32(0), vocabulary.fewest))
  guess = jnp.max(few, axis=1)
  zero = jnp.zeros_like(guess)
  sums = jax.lax.while_loop(
    lambda sums: jnp.any(sums.reach > _REACH),
    lambda sums: walk(sums.largest),
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
  """Returns the cotangents of hidden, head and bias, each in the dtype of what it is one of.

  Args:
    options: of the call.
    hidden: as in `forward`, like all that follow.
    head: as there.
    bias: as there.
    labels: as there.
    log_z: what `forward` returned.
    softmax_bar: what multiplies the softmax in the logits' cotangent.
    label_bar: what is subtracted from that at the label.
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
    head: [D, c] or [c, D], as the head is laid out.
    bias: of each column, if any.
    index: of each column, in the vocabulary.
  """

  head: Array
  bias: Float[Array, " c"] | None
  index: Int[Array, " c"]


class _Vocabulary:
  """The head and its bias, to be taken by chunks.

  The vocabulary is seen as P stripes of V / P columns, and a chunk takes some of each stripe. On a
  mesh P is the number of devices that the vocabulary is split over: each of them then finds its
  part of every chunk in what it holds. Elsewhere P is 1.

  Attributes:
    head: [D, P, V / P] or [P, V / P, D].
    axis: of V / P in the head.
    bias: [P, V / P], or None.
    fewest: how many columns of a stripe are worth taking.
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
    """Calls `carry = body(start, size, carry)` for chunks of one size, and one for any rest.

    A loop: unrolled, 32 chunks take the TPU compiler a minute, and compilers that find the same
    logits in the forward and the backward pass keep those of all chunks from one to the other.

    Args:
      tokens: N, which limits a chunk's size.
      body: gets the first column within each stripe, int32, and the number of them.
      carry: what it begins with.
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
    """Writes the columns that begin at `start` into an array of the head's or bias's shape."""
    shape = (
      *array.shape[:axis],
      part.size * self._split[1] // array.size,
      *array.shape[axis + 1 :],
    )
    part = part.reshape(shape).astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=axis)


def _chunk_size(length: int, most: int) -> int:
  """Returns a chunk's columns: whole lanes, and so that no rest is left if that costs little."""
  if length <= most:
    return length
  most = max(most - most % LANES, LANES)
  even = (size for size in range(most, most // 2, -LANES) if length % size == 0)
  return next(even, most)


def _logits(
  options: Options, hidden: Float[Array, "N D"], columns: _Columns
) -> tuple[Float[Array, "N c"], Float[Array, "N c"] | None]:
  """Returns logits, and the slope of the soft cap there, if any."""
  logits = _dot(hidden, columns.head, (1, options.head_layout.index("d")))
  if columns.bias is not None:
    logits = logits + columns.bias.astype(jnp.float32)[None]
  if options.logits_soft_cap is None:
    return logits, None
  return soft_cap(logits, options.logits_soft_cap)


def _dot(left: Array, right: Array, axes: tuple[int, int]) -> Float[Array, "a b"]:
  """Multiplies matrices in float32, which on a TPU has to be asked for.

  Two bfloat16 operands have exact products. A float32 one with a bfloat16 one is taken as the sum
  of two bfloat16 numbers (HIGH takes both operands so; the compiler drops the pass for the half
  that is 0), two float32 ones as sums of three.
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
