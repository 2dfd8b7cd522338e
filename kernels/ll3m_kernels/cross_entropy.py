"""Softmax cross-entropy of a linear head without the [tokens, V] logits.

The vocabulary is walked in chunks, forward with a running log-sum-exp, and backward with the
chunk's logits computed again (the idea of Wijmans et al., "Cut Your Losses", 2024, without their
filtering). Chunking over V, not over tokens, lets each chunk of the head's gradient be finished
at once and the hidden states' gradient be summed in float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ll3m_kernels import dispatch

_CHUNK = 8192
_NO_KERNEL = "linear_cross_entropy: it is chunked XLA on every platform"


class _Options(NamedTuple):
  """What does not change with the data: hashable, so that it may be a static argument."""

  head_layout: str
  logits_soft_cap: float | None
  z_loss: float
  num_chunks: int


def linear_cross_entropy(
  hidden: Float[Array, "*B D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  labels: Int[Array, "*B"],
  *,
  head_layout: str = "dv",
  bias: Float[Array, " V"] | None = None,
  mask: Bool[Array, "*B"] | Float[Array, "*B"] | None = None,
  logits_soft_cap: float | None = None,
  z_loss: float = 0.0,
  return_correct: bool = False,
  implementation: str | None = None,
) -> (
  tuple[Float[Array, "*B"], Float[Array, "*B"]]
  | tuple[Float[Array, "*B"], Float[Array, "*B"], Bool[Array, "*B"]]
):
  """Computes -log softmax(hidden @ head + bias)[label] and the z-loss of every token.

  Args:
    hidden: what the head reads.
    head: its weight, [D, V] or, for a tied embedding, [V, D].
    labels: 0 <= label < V.
    head_layout: "dv" or "vd": which of the two the head is.
    bias: added to the logits.
    mask: multiplies both losses; where it is 0 they are 0 and give no gradient.
    logits_soft_cap: logits become cap * tanh(logits / cap).
    z_loss: weight of log(Z)^2 (Chowdhery et al., 2022, PaLM).
    return_correct: also return whether the label has the largest logit, which costs nothing here.
    implementation: see `dispatch.resolve`.

  Returns:
    (loss, z_loss): float32 in the labels' shape; the first does not contain the second. With
    `return_correct`, a third array of booleans (False where the mask is 0), without a gradient.

  Raises:
    ValueError: shapes, dtypes or a layout that do not fit.
  """
  _check(hidden, head, labels, head_layout, bias, mask)
  dispatch.choose(implementation, _NO_KERNEL)
  vocabulary = head.shape[head_layout.index("v")]
  options = _Options(head_layout, logits_soft_cap, z_loss, -(-vocabulary // _CHUNK))
  keep = jnp.ones(labels.shape, bool) if mask is None else mask != 0
  loss, penalty, correct = _losses(
    options,
    hidden.reshape(-1, hidden.shape[-1]),
    head,
    bias,
    labels.reshape(-1).astype(jnp.int32),
    keep.reshape(-1),
  )
  loss, penalty = loss.reshape(labels.shape), penalty.reshape(labels.shape)
  if mask is not None and mask.dtype != jnp.bool_:
    loss, penalty = loss * mask, penalty * mask
  if return_correct:
    return loss, penalty, correct.reshape(labels.shape)
  return loss, penalty


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options, hidden, head, bias, labels, keep):
  return _forward(options, hidden, head, bias, labels, keep)[0]


def _forward(options, hidden, head, bias, labels, keep):
  tokens = hidden.shape[0]
  largest = jnp.full((tokens,), -jnp.inf, jnp.float32)
  total = jnp.zeros((tokens,), jnp.float32)
  picked = jnp.zeros((tokens,), jnp.float32)
  for start, size in _chunks(options, head):
    logits = _logits(options, hidden, head, bias, start, size)[0]
    new = jnp.maximum(largest, jnp.max(logits, axis=-1))
    total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=-1)
    largest = new
    inside = (labels >= start) & (labels < start + size)
    index = jnp.clip(labels - start, 0, size - 1)
    label_logit = jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0]
    picked = jnp.where(inside, label_logit, picked)
  log_z = largest + jnp.log(total)
  loss = jnp.where(keep, log_z - picked, 0.0)
  penalty = jnp.where(keep, options.z_loss * log_z**2, 0.0)
  correct = keep & (picked >= largest)
  return (loss, penalty, correct), (hidden, head, bias, labels, keep, log_z)


def _backward(options, residuals, cotangents):
  hidden, head, bias, labels, keep, log_z = residuals
  loss_bar, penalty_bar = (jnp.where(keep, c, 0.0)[:, None] for c in cotangents[:2])
  # d loss / d logits = p - onehot;  d penalty / d logits = 2 z log_z p
  softmax_bar = loss_bar + penalty_bar * (2 * options.z_loss * log_z)[:, None]
  hidden_bar = jnp.zeros(hidden.shape, jnp.float32)
  head_bars, bias_bars = [], []
  for start, size in _chunks(options, head):
    logits, slope = _logits(options, hidden, head, bias, start, size)
    onehot = (labels - start)[:, None] == jnp.arange(size)[None]
    logits_bar = jnp.exp(logits - log_z[:, None]) * softmax_bar - jnp.where(onehot, loss_bar, 0.0)
    if slope is not None:
      logits_bar = logits_bar * slope
    narrow = logits_bar.astype(hidden.dtype)
    axis = options.head_layout.index("v")
    part = jax.lax.slice_in_dim(head, start, start + size, axis=axis)
    hidden_bar += _dot(narrow, part, (1,), (axis,))
    operands = (hidden, narrow) if options.head_layout == "dv" else (narrow, hidden)
    head_bars.append(_dot(*operands, (0,), (0,)).astype(head.dtype))
    bias_bars.append(jnp.sum(logits_bar, axis=0))
  head_bar = jnp.concatenate(head_bars, axis=options.head_layout.index("v"))
  bias_bar = None if bias is None else jnp.concatenate(bias_bars).astype(bias.dtype)
  no_gradient = np.zeros(labels.shape, jax.dtypes.float0)
  return hidden_bar.astype(hidden.dtype), head_bar, bias_bar, no_gradient, no_gradient


_losses.defvjp(_forward, _backward)


def _chunks(options: _Options, head: Array) -> list[tuple[int, int]]:
  """Cuts the vocabulary into (start, size) of nearly equal sizes."""
  vocabulary = head.shape[options.head_layout.index("v")]
  size = -(-vocabulary // options.num_chunks)
  size = min(vocabulary, -(-size // 128) * 128)
  return [(start, min(size, vocabulary - start)) for start in range(0, vocabulary, size)]


def _logits(options, hidden, head, bias, start, size) -> tuple[Array, Array | None]:
  """Returns a chunk's logits, float32 [tokens, size], and the slope of the soft cap, if any."""
  axis = options.head_layout.index("v")
  part = jax.lax.slice_in_dim(head, start, start + size, axis=axis)
  logits = _dot(hidden, part, (1,), (1 - axis,))
  if bias is not None:
    logits = logits + bias[None, start : start + size].astype(jnp.float32)
  if options.logits_soft_cap is None:
    return logits, None
  capped = jnp.tanh(logits / options.logits_soft_cap)
  return options.logits_soft_cap * capped, 1.0 - capped**2


def _dot(left: Array, right: Array, left_axes: tuple, right_axes: tuple) -> Array:
  # TPUs round float32 operands to bfloat16 unless told otherwise.
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    left,
    right,
    ((left_axes, right_axes), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _check(hidden: Array, head: Array, labels: Array, layout: str, bias: Any, mask: Any) -> None:
  if layout not in ("dv", "vd"):
    raise ValueError(f"head_layout must be 'dv' or 'vd', got {layout!r}")
  if hidden.ndim < 1 or head.ndim != 2:
    raise ValueError(f"hidden must be [.., D] and head a matrix, got {hidden.shape}, {head.shape}")
  if head.shape[layout.index("d")] != hidden.shape[-1]:
    raise ValueError(
      f"head of layout {layout!r} must have {hidden.shape[-1]} as its D, got {head.shape}"
    )
  if labels.shape != hidden.shape[:-1]:
    raise ValueError(f"labels must have shape {hidden.shape[:-1]}, got {labels.shape}")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers, got {labels.dtype}")
  vocabulary = head.shape[layout.index("v")]
  if bias is not None and bias.shape != (vocabulary,):
    raise ValueError(f"bias must have shape {(vocabulary,)}, got {bias.shape}")
  if mask is not None and mask.shape != labels.shape:
    raise ValueError(f"mask must have shape {labels.shape}, got {mask.shape}")
