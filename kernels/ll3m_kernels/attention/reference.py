"""Attention in plain jnp, all scores in memory: what every implementation is held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ll3m_kernels.attention.spec import MASKED


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  scale: float,
  is_causal: bool,
  window: tuple[int, int] | None,
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
  logits_soft_cap: float | None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Computes attention with all scores in memory; see `flash_attention`.

  Returns:
    The attended values in the query's dtype, and the log-sum-exp of the scores in float32
    (-1e30 where a query sees no key).
  """
  batch, length, num_heads, _ = query.shape
  num_kv_heads = key.shape[2]
  grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, -1)
  scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
  if logits_soft_cap is not None:
    scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
  visible = mask(
    length, key.shape[1], is_causal=is_causal, window=window, query_ids=query_ids, key_ids=key_ids
  )
  if visible is not None:
    visible = visible[:, None, None]  # [B, 1, 1, T, S]
    scores = jnp.where(visible, scores, MASKED)
  largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - largest)
  if visible is not None:
    weights = jnp.where(visible, weights, 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  empty = total == 0.0
  weights = weights / jnp.where(empty, 1.0, total)
  output = jnp.einsum(
    "BKGTS,BSKH->BTKGH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  log_sum_exp = jnp.where(empty, MASKED, largest + jnp.log(jnp.where(empty, 1.0, total)))
  return (
    output.reshape(batch, length, num_heads, -1).astype(query.dtype),
    log_sum_exp.reshape(batch, num_heads, length),
  )


def mask(
  length: int,
  key_length: int,
  *,
  is_causal: bool,
  window: tuple[int, int] | None,
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
) -> Bool[Array, "B T S"] | None:
  """Returns which keys each query sees ([1, T, S] without segments), or None if all."""
  visible = None
  rows = jnp.arange(length)[:, None]
  columns = jnp.arange(key_length)[None, :]
  if is_causal:
    visible = columns <= rows
  if window is not None:
    near = (columns >= rows - window[0]) & (columns <= rows + window[1])
    visible = near if visible is None else visible & near
  if visible is not None:
    visible = visible[None]
  if query_ids is not None:
    same = query_ids[:, :, None] == key_ids[:, None, :]
    visible = same if visible is None else visible & same
  return visible
