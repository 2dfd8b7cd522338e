"""The public cross-entropy function: argument checks and derivatives."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int

from ll3m_kernels import dispatch
from ll3m_kernels.cross_entropy import xla
from ll3m_kernels.sharding import Sharding, check_sharding, laid_out_for, vary_alike
from ll3m_kernels.validation import check_array, finite_number, flag, floating, integers

_REFUSAL = (
  "this operation: it has no kernel, because the compiler's static profile estimates plain jnp to "
  "be as fast on TPUs (see ll3m_kernels/cross_entropy/xla.py)"
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

  The [.., V] logits are never in memory, forward or backward: the vocabulary is processed in
  chunks, as in "Cut Your Losses" (Wijmans et al., 2024). All sums are in float32, including those
  in the gradients of hidden and head, and so are their terms. With bfloat16 inputs, a gradient is
  therefore the exact one rounded once, up to 1e-6 of its largest value.

  Args:
    hidden: Hidden states, the input of the head.
    head: Weight of the head, [D, V] or, for a tied embedding, [V, D].
    labels: Labels, 0 <= label < V. Any other integer, of any width, matches no column: the token's
      loss is log Z, and it is never correct.
    head_layout: Layout of the head, "dv" or "vd".
    bias: Bias added to the logits. A bias of -inf removes a column from the vocabulary: a token
      with this label has a loss of inf and finite gradients. (With a soft cap it does not remove
      the column, because the cap is applied afterwards.) A token with no column left has a loss of
      inf, or -inf if its label matches no column; it is never correct and has no gradients.
    mask: Factor of both losses. A token whose mask is 0 has no effect: its losses and all gradients
      through it (the mask's too) are 0, even if its hidden state contains NaN.
    logits_soft_cap: Cap of the logits, which become cap * tanh(logits / cap) (Gemma Team, 2024,
      Gemma 2).
    z_loss: Weight of log(Z)^2, at least 0 (Chowdhery et al., 2022, PaLM).
    return_correct: Whether to also return if the label has the largest logit; this costs nothing.
    implementation: None or "xla"; see `dispatch.resolve`. There is no "pallas".
    sharding: Layout of the arrays on a mesh: tokens over the batch axes, the vocabulary over the
      head axis if it divides evenly. The mesh's axes must not be Explicit. Without a sharding the
      result is the same, but all devices that share the vocabulary compute the whole.

  Returns:
    (loss, z_loss): Float32 arrays in the labels' shape; `loss` does not include `z_loss`. With
    `return_correct`, also a boolean array (False where the mask is 0), without a gradient.

  Raises:
    ValueError: A shape, dtype or option is invalid.
    NotImplementedError: The implementation is "pallas" or unknown, the mesh has Explicit axes, or
      the call is differentiated twice.
  """
  plan = make_plan(
    hidden=hidden,
    head=head,
    labels=labels,
    head_layout=head_layout,
    bias=bias,
    mask=mask,
    logits_soft_cap=logits_soft_cap,
    z_loss=z_loss,
    return_correct=return_correct,
    implementation=implementation,
    sharding=sharding,
  )
  hidden, head, labels, bias, mask = plan.arrays
  keep = None if mask is None else mask.reshape(-1) != 0
  arrays = (hidden.reshape(-1, hidden.shape[-1]), head, bias, labels.reshape(-1), keep)
  losses = _losses(plan.options, *vary_alike(*arrays))
  loss, penalty, correct = (x.reshape(labels.shape) for x in losses)
  if mask is not None and mask.dtype != jnp.bool_:
    weight = mask.astype(jnp.float32)
    loss, penalty = loss * weight, penalty * weight
  return (loss, penalty, correct) if plan.returns_correct else (loss, penalty)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options, hidden, head, bias, labels, keep):
  return _forward(options, hidden, head, bias, labels, keep)[0]


def _forward(options, hidden, head, bias, labels, keep):
  function = functools.partial(xla.forward, options)
  log_z, picked, largest = dispatch.first_order(
    "linear_cross_entropy", function, _kept(hidden, keep), head, bias, labels
  )
  vocabulary = head.shape[options.head_layout.index("v")]
  is_column = (labels >= 0) & (labels < vocabulary)
  # If a token has no column left, log Z and the label's logit are both -inf.
  loss = jnp.where(is_column & (picked == -jnp.inf), jnp.inf, log_z - picked)
  penalty = options.z_loss * log_z**2 if options.z_loss else jnp.zeros_like(log_z)
  loss, penalty = _kept(loss, keep), _kept(penalty, keep)
  correct = _kept(is_column & (picked >= largest) & (largest > -jnp.inf), keep)
  return (loss, penalty, correct), (hidden, head, bias, labels, keep, log_z)


def _backward(options, residuals, cotangents):
  hidden, head, bias, labels, keep, log_z = residuals
  # A token without a column left has no gradients.
  counts = log_z != -jnp.inf
  loss_bar, penalty_bar = (_kept(_kept(x, keep), counts) for x in cotangents[:2])
  log_z = _kept(log_z, counts)
  # d loss / d logits = p - onehot;  d penalty / d logits = 2 z log_z p
  softmax_bar = loss_bar + penalty_bar * (2 * options.z_loss * log_z)
  bars = dispatch.first_order(
    "linear_cross_entropy",
    functools.partial(xla.backward, options),
    *(_kept(hidden, keep), head, bias, labels, log_z, softmax_bar, loss_bar),
  )
  return (*bars, None, None)


# In a vmap, an output that is not batched has one cotangent, not one per element of the batch.
_losses.defvjp(_forward, _backward, generic_batching=True)


def _kept(x: Array, keep: Bool[Array, " N"] | None) -> Array:
  """Sets the values of masked tokens to 0."""
  if keep is None:
    return x
  return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


class Plan(NamedTuple):
  """The plan of a call, shared by the call and its explanation.

  Attributes:
    options: Static options of the call.
    arrays: Hidden states, head, labels (int32), bias and mask.
    returns_correct: Whether to also return which labels have the largest logit.
    text: Description in words.
  """

  options: xla.Options
  arrays: tuple[Any, Any, Any, Any, Any]
  returns_correct: bool
  text: str


def make_plan(
  *,
  hidden: Any,
  head: Any,
  labels: Any,
  head_layout: Any,
  bias: Any,
  mask: Any,
  logits_soft_cap: Any,
  z_loss: Any,
  return_correct: Any,
  implementation: Any,
  sharding: Any,
) -> Plan:
  """Checks the arguments of `linear_cross_entropy` and chooses its implementation."""
  if head_layout not in ("dv", "vd"):
    raise ValueError(f"head_layout must be 'dv' or 'vd', got {head_layout!r}")
  hidden, head = floating("hidden", hidden), floating("head", head)
  bias = None if bias is None else floating("bias", bias)
  integers("labels", labels)
  mask = None if mask is None else _mask(mask)
  _check_shapes(hidden, head, labels, head_layout, bias, mask)
  if logits_soft_cap is not None:
    logits_soft_cap = finite_number("logits_soft_cap", logits_soft_cap, above=0)
  z_loss = finite_number("z_loss", z_loss, at_least=0)
  returns_correct = flag("return_correct", return_correct)
  check_sharding(sharding)
  if sharding is not None:
    if len(hidden.shape) > 1:
      sharding.check_batch("hidden", hidden.shape)
    if AxisType.Explicit in sharding.mesh.axis_types:
      raise NotImplementedError(
        f"sharding: the axes of its mesh must be Auto or Manual, got {sharding.mesh.axis_types}"
      )
  with laid_out_for(sharding):
    dispatch.choose(implementation, _REFUSAL)
    text = dispatch.describe("linear_cross_entropy", implementation, _REFUSAL, {})
  options = xla.Options(head_layout, logits_soft_cap, z_loss, sharding)
  return Plan(options, (hidden, head, _columns(labels), bias, mask), returns_correct, text)


def _check_shapes(hidden: Any, head: Any, labels: Any, layout: str, bias: Any, mask: Any) -> None:
  if len(hidden.shape) < 1 or len(head.shape) != 2:
    raise ValueError(f"hidden must be [.., D] and head a matrix, got {hidden.shape}, {head.shape}")
  if not hidden.shape[-1]:
    raise ValueError(f"hidden must have a D of at least 1, got shape {hidden.shape}")
  if head.shape[layout.index("d")] != hidden.shape[-1]:
    raise ValueError(
      f"head with layout {layout!r} must have D = {hidden.shape[-1]}, got shape {head.shape}"
    )
  vocabulary = head.shape[layout.index("v")]
  if not vocabulary:
    raise ValueError(f"head must have a vocabulary of at least 1, got shape {head.shape}")
  if labels.shape != hidden.shape[:-1]:
    raise ValueError(f"labels must have shape {hidden.shape[:-1]}, got {labels.shape}")
  if bias is not None and bias.shape != (vocabulary,):
    raise ValueError(f"bias must have shape {(vocabulary,)}, got {bias.shape}")
  if mask is not None and mask.shape != labels.shape:
    raise ValueError(f"mask must have shape {labels.shape}, got {mask.shape}")


def _mask(mask: Any) -> Any:
  """Returns a mask as a jax array, or its description."""
  check_array("mask", mask)
  if mask.dtype != jnp.bool_ and not jnp.issubdtype(mask.dtype, jnp.floating):
    raise ValueError(f"mask must be boolean or floating, got {mask.dtype}")
  return jnp.asarray(mask) if isinstance(mask, np.ndarray | np.generic) else mask


def _columns(labels: Any) -> Any:
  """Returns labels as int32; labels that do not fit in it still match no column."""
  if not isinstance(labels, jax.Array | np.ndarray | np.generic):
    return labels
  if not np.can_cast(labels.dtype, np.int32):
    most, own = np.iinfo(np.int32), np.iinfo(labels.dtype)
    # Clipped in the labels' own dtype: a Python number that does not fit in it would raise.
    low, high = max(most.min, own.min), min(most.max, own.max)
    labels = labels.clip(labels.dtype.type(low), labels.dtype.type(high))
  return jnp.asarray(labels.astype(np.int32))
