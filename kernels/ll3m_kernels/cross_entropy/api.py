"""The public cross-entropy function: checks its arguments and makes it differentiable."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.cross_entropy import xla
from ll3m_kernels.sharding import Sharding, vary_alike

_REFUSAL = (
  "linear_cross_entropy: there is no kernel, because plain jnp is as fast on TPUs (measured in "
  "ll3m_kernels/cross_entropy/xla.py)"
)


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
  sharding: Sharding | None = None,
) -> (
  tuple[Float[Array, "*B"], Float[Array, "*B"]]
  | tuple[Float[Array, "*B"], Float[Array, "*B"], Bool[Array, "*B"]]
):
  """Computes -log softmax(hidden @ head + bias)[label] and the z-loss of every token.

  The [.., V] logits are never in memory, forward or backward: the vocabulary is taken in chunks,
  as in "Cut Your Losses" (Wijmans et al., 2024). All sums, those of the gradients of hidden and
  head among them, are in float32, and so is every number that enters them: with bfloat16 inputs,
  a gradient is the exact one rounded once, up to 1e-6 of the largest.

  Args:
    hidden: what the head reads.
    head: its weight, [D, V] or, for a tied embedding, [V, D].
    labels: 0 <= label < V. Any other number is no column's: its token's loss is log Z, and it is
      never correct.
    head_layout: "dv" or "vd": which of the two the head is.
    bias: added to the logits.
    mask: multiplies both losses. A token whose mask is 0 might as well not be there: whatever its
      hidden state holds, even NaN, its losses and all gradients through it are 0 (the mask's own
      too).
    logits_soft_cap: logits become cap * tanh(logits / cap) (Gemma Team, 2024, Gemma 2).
    z_loss: weight of log(Z)^2 (Chowdhery et al., 2022, PaLM).
    return_correct: also return whether the label has the largest logit, which costs nothing here.
    implementation: None or "xla"; see `dispatch.resolve`. There is no "pallas".
    sharding: how the arrays lie on a mesh: tokens over the batch axes, the vocabulary over the
      head axis if it divides. Without it the result is the same, but the devices among which the
      vocabulary is split all compute the whole.

  Returns:
    (loss, z_loss): float32 in the labels' shape; the first does not contain the second. With
    `return_correct`, a third array of booleans (False where the mask is 0), without a gradient.

  Raises:
    ValueError: shapes, dtypes or options that do not fit.
    NotImplementedError: the implementation is "pallas" or unknown, or this is differentiated
      twice.
  """
  _check(hidden, head, labels, head_layout, bias, mask, logits_soft_cap)
  dispatch.choose(implementation, _REFUSAL)
  options = xla.Options(head_layout, logits_soft_cap, float(z_loss), sharding)
  keep = None if mask is None else mask.reshape(-1) != 0
  arrays = (
    hidden.reshape(-1, hidden.shape[-1]),
    head,
    bias,
    labels.reshape(-1).astype(jnp.int32),
    keep,
  )
  losses = _losses(options, *vary_alike(*arrays))
  loss, penalty, correct = (x.reshape(labels.shape) for x in losses)
  if mask is not None and mask.dtype != jnp.bool_:
    weight = mask.astype(jnp.float32)
    loss, penalty = loss * weight, penalty * weight
  return (loss, penalty, correct) if return_correct else (loss, penalty)


def explain(
  hidden: Any,
  head: Any,
  labels: Any,
  *,
  head_layout: str = "dv",
  bias: Any = None,
  mask: Any = None,
  logits_soft_cap: float | None = None,
  implementation: str | None = None,
  **_: Any,
) -> str:
  """Says what `linear_cross_entropy` would run for these arguments."""
  _check(hidden, head, labels, head_layout, bias, mask, logits_soft_cap)
  return dispatch.describe("linear_cross_entropy", implementation, _REFUSAL, {})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options, hidden, head, bias, labels, keep):
  return _forward(options, hidden, head, bias, labels, keep)[0]


def _forward(options, hidden, head, bias, labels, keep):
  function = functools.partial(xla.forward, options)
  log_z, picked, largest = dispatch.first_order(
    "linear_cross_entropy", function, _kept(hidden, keep), head, bias, labels
  )
  loss, penalty = _kept(log_z - picked, keep), _kept(options.z_loss * log_z**2, keep)
  vocabulary = head.shape[options.head_layout.index("v")]
  correct = _kept((labels >= 0) & (labels < vocabulary) & (picked >= largest), keep)
  return (loss, penalty, correct), (hidden, head, bias, labels, keep, log_z)


def _backward(options, residuals, cotangents):
  hidden, head, bias, labels, keep, log_z = residuals
  loss_bar, penalty_bar = (_kept(x, keep) for x in cotangents[:2])
  # d loss / d logits = p - onehot;  d penalty / d logits = 2 z log_z p
  softmax_bar = loss_bar + penalty_bar * (2 * options.z_loss * log_z)
  bars = dispatch.first_order(
    "linear_cross_entropy",
    functools.partial(xla.backward, options),
    *(_kept(hidden, keep), head, bias, labels, log_z, softmax_bar, loss_bar),
  )
  return (*bars, None, None)


_losses.defvjp(_forward, _backward)


def _kept(x: Array, keep: Bool[Array, " N"] | None) -> Array:
  """Replaces by 0 what belongs to tokens that are masked out."""
  if keep is None:
    return x
  return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def _check(
  hidden: Any, head: Any, labels: Any, layout: str, bias: Any, mask: Any, soft_cap: float | None
) -> None:
  if layout not in ("dv", "vd"):
    raise ValueError(f"head_layout must be 'dv' or 'vd', got {layout!r}")
  for name, array in (("hidden", hidden), ("head", head), ("bias", bias)):
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating, got {array.dtype}")
  if len(hidden.shape) < 1 or len(head.shape) != 2:
    raise ValueError(f"hidden must be [.., D] and head a matrix, got {hidden.shape}, {head.shape}")
  if head.shape[layout.index("d")] != hidden.shape[-1]:
    raise ValueError(
      f"head of layout {layout!r} must have {hidden.shape[-1]} as its D, got {head.shape}"
    )
  vocabulary = head.shape[layout.index("v")]
  if not vocabulary:
    raise ValueError(f"head must have a vocabulary, got {head.shape}")
  if labels.shape != hidden.shape[:-1]:
    raise ValueError(f"labels must have shape {hidden.shape[:-1]}, got {labels.shape}")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers, got {labels.dtype}")
  if bias is not None and bias.shape != (vocabulary,):
    raise ValueError(f"bias must have shape {(vocabulary,)}, got {bias.shape}")
  if mask is not None and mask.shape != labels.shape:
    raise ValueError(f"mask must have shape {labels.shape}, got {mask.shape}")
  if mask is not None and not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.floating)):
    raise ValueError(f"mask must be boolean or floating, got {mask.dtype}")
  if soft_cap is not None and not soft_cap > 0:
    raise ValueError(f"logits_soft_cap must be positive, got {soft_cap}")
