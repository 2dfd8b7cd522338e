"""Oracles of the benchmarked operations in plain jnp and NumPy, without the code under test.

The jnp functions compute in the wider of float32 and their inputs' dtype and return the inputs'
dtype. With float64 inputs they are an oracle; with bfloat16 inputs they show the accuracy of plain
jnp.

Dimensions: B batch, T queries, S keys, N query heads, K KV heads, H head dim, D features, V
vocabulary, R rotated dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# (arrays, cotangents of the results) -> results, then the gradients of the floating-point arrays.
Oracle = Callable[[Sequence[Any], Any], list[np.ndarray]]


def by_autodiff(function: Callable[..., Any]) -> Oracle:
  """Returns an oracle that runs a jnp function and jax's derivatives of it on the host's CPU."""

  def oracle(arrays, cotangents):
    with jax.enable_x64(True), jax.default_device(_cpu()):
      arrays, cotangents = jax.tree.map(jnp.asarray, (list(arrays), cotangents))
      count = sum(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)

      @jax.jit
      def both(arrays, cotangents):
        results, vjp = jax.vjp(lambda *x: function(*x, *arrays[count:]), *arrays[:count])
        return results, vjp(cotangents)

      return [np.asarray(x) for x in jax.tree.leaves(both(arrays, cotangents))]

  return oracle


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  is_causal: bool,
  window: int | None,
  logits_soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
  """Computes softmax(Q K^T / sqrt(H)) V with every score in memory.

  Args:
    query: Queries; head n reads KV head n // (N / K).
    key: Keys.
    value: Values.
    is_causal: Whether query t sees only the keys s <= t.
    window: Number of the latest of these keys that a query sees, including its own; None for all.
    logits_soft_cap: Scores become cap * tanh(scores / cap); None for no cap.
  """
  group = query.shape[2] // key.shape[2]
  keys, values = (jnp.repeat(x, group, axis=2) for x in (key, value))
  wide = _wide(query)
  scores = jnp.einsum("btnh,bsnh->bnts", query, keys, preferred_element_type=wide)
  t, s = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None]
  seen = (s <= t) if is_causal else jnp.ones((t.size, s.size), bool)
  if window is not None:
    seen &= t - s < window
  scores = scores * query.shape[-1] ** -0.5
  if logits_soft_cap is not None:
    scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
  scores = jnp.where(seen[None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  attended = jnp.einsum("bnts,bsnh->btnh", weights, values, preferred_element_type=wide)
  return attended.astype(query.dtype)


def norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None = None,
  *,
  is_centred: bool,
  epsilon: float,
  scale_offset: float = 0.0,
) -> Float[Array, "*B D"]:
  """Computes LayerNorm if `is_centred`, else RMSNorm."""
  wide = _wide(x)
  rows, gain = x.astype(wide), scale.astype(wide) + scale_offset
  if is_centred:
    rows -= rows.mean(axis=-1, keepdims=True)
  unit = rows / jnp.sqrt((rows**2).mean(axis=-1, keepdims=True) + epsilon)
  normed = unit * _last(gain, x.ndim)
  if bias is not None:
    normed += _last(bias.astype(wide), x.ndim)
  return normed.astype(x.dtype)


def add_norm(
  norm: Callable[..., Float[Array, "*B D"]],
  dtype: Any,
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  *weights: Float[Array, " D"],
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Computes (norm of the sum, sum), where the sum is rounded to `dtype` as in the operation."""
  total = x + residual
  # The derivative is that of the sum without the rounding.
  total += jax.lax.stop_gradient(total.astype(dtype).astype(total.dtype) - total)
  return norm(total, *weights), total


def rotary(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  positions: Int[Array, "B T"],
  *,
  theta: float,
  rotary_dim: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
  """Rotates the pairs (x[i], x[i + R/2]) by positions * theta**(-2i/R), with float64 angles."""
  # Checkpoints are trained with float32 frequencies, so their rounding is part of the definition.
  frequencies = (theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)
  angles = positions.astype(jnp.float64)[..., None, None] * frequencies[None, None, None]

  def rotate(x):
    first, second, rest = jnp.split(x, [rotary_dim // 2, rotary_dim], axis=-1)
    turn = jax.lax.complex(jnp.cos(angles), jnp.sin(angles))
    turned = jax.lax.complex(first.astype(jnp.float64), second.astype(jnp.float64)) * turn
    parts = (turned.real.astype(x.dtype), turned.imag.astype(x.dtype), rest)
    return jnp.concatenate(parts, axis=-1)

  return rotate(query), rotate(key)


def cross_entropy(layout: str) -> Oracle:
  """Returns an oracle of the loss of a linear head and its gradients, in float64 NumPy.

  Args:
    layout: Layout of the head, "dv" or "vd".

  Returns:
    An oracle of (hidden [T, D], head, labels [T]) or (hidden, head, bias [V], labels), for
    cotangents [T] of the losses.
  """

  def oracle(arrays, cotangents):
    hidden, head, *bias = (np.asarray(x, np.float64) for x in arrays[:-1])
    labels, cotangents = np.asarray(arrays[-1]), np.asarray(cotangents, np.float64)
    matrix = head if layout == "dv" else head.T  # [D, V]
    logits = hidden @ matrix + (bias[0] if bias else 0.0)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    rows = np.arange(labels.size)
    loss = -log_probabilities[rows, labels]
    logits_bar = np.exp(log_probabilities)
    logits_bar[rows, labels] -= 1.0
    logits_bar *= cotangents[:, None]
    head_bar = hidden.T @ logits_bar
    head_bar = head_bar if layout == "dv" else head_bar.T
    return [loss, logits_bar @ matrix.T, head_bar, *([logits_bar.sum(0)] if bias else [])]

  return oracle


def _wide(x: Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)


def _last(weight: Array, ndim: int) -> Array:
  return weight.reshape((1,) * (ndim - 1) + weight.shape)


def _cpu() -> jax.Device:
  return jax.devices("cpu")[0]
