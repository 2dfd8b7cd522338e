"""The implementation "xla": attention in plain jnp, one block of queries at a time.

It never holds the whole [T, S] scores: a block of queries reads only the keys that the causal mask
and the window let any of them see. The backward pass recomputes the weights from the log-sum-exp
(Dao, 2023); XLA's own gradient would keep three [T, S] arrays per layer. For 2 x 512 tokens and
SmolLM2's heads, forward and backward take a third of the CPU time of computing the whole scores
with XLA's gradient.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ll3m_kernels.attention.spec import MASKED, Spec, keys_seen_by_any, within
from ll3m_kernels.soft_cap import soft_cap

# Shorter blocks skip more masked scores but make smaller products.
_BLOCK = 128
# Each block is compiled separately, so long sequences get longer blocks.
_MAX_BLOCKS = 32


def forward(
  spec: Spec,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Computes attention; see `flash_attention`.

  Returns:
    The attended values in the query's dtype, and the log-sum-exp of the scores in float32
    (-1e30 where a query sees no key).
  """
  num_heads, num_kv_heads = query.shape[2], key.shape[2]
  group = num_heads // num_kv_heads
  keys, values = _by_head(key), _by_head(value)
  outputs, sums = [], []
  for rows, columns in _blocks(spec, query.shape[1], key.shape[1]):
    scores, _ = _scores(spec, _group(query[:, rows], num_kv_heads), keys[:, :, columns], group)
    visible = _visible(spec, rows, columns, query_ids, key_ids)
    if visible is not None:
      scores = jnp.where(visible, scores, MASKED)
    # Above MASKED, so that the weights of masked scores are 0 even where all scores are masked.
    m = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), 0.5 * MASKED)
    weights = jnp.exp(scores - m)  # [B, K, G, t, s]
    l = jnp.sum(weights, axis=-1, keepdims=True)
    is_empty = l == 0.0
    l = jnp.where(is_empty, 1.0, l)
    output = _dot("bkts,bksh->bkth", _as_rows(weights.astype(value.dtype)), values[:, :, columns])
    output = output / l.reshape(*output.shape[:-1], 1)
    outputs.append(_ungroup(output, num_heads).astype(query.dtype))
    sums.append(jnp.where(is_empty, MASKED, m + jnp.log(l)))
  output = jnp.concatenate(outputs, axis=1)
  log_sum_exp = jnp.concatenate(sums, axis=3)  # [B, K, G, T, 1]
  return output, log_sum_exp.reshape(output.shape[0], num_heads, -1)


def backward(
  spec: Spec,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
  output: Float[Array, "B T N Hv"],
  log_sum_exp: Float[Array, "B N T"],
  output_bar: Float[Array, "B T N Hv"],
  log_sum_exp_bar: Float[Array, "B N T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
  """Computes the cotangents of query, key and value."""
  num_heads, num_kv_heads = query.shape[2], key.shape[2]
  group = num_heads // num_kv_heads
  keys, values = _by_head(key), _by_head(value)
  log_sum_exp = log_sum_exp.reshape(*keys.shape[:2], group, -1, 1)
  # dS = P * (dP - delta), where delta = sum(dO * O) - d(log-sum-exp).
  delta = jnp.sum(output_bar.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)  # [B, T, N]
  delta = (delta.swapaxes(1, 2) - log_sum_exp_bar).reshape(log_sum_exp.shape)
  query_bars = []
  # Transposed, [B, K, H, S]: otherwise XLA:CPU copies a transposed block of scores, the larger
  # operand.
  key_bar = jnp.zeros((*keys.shape[:2], keys.shape[3], keys.shape[2]), jnp.float32)
  value_bar = jnp.zeros((*values.shape[:2], values.shape[3], values.shape[2]), jnp.float32)
  for rows, columns in _blocks(spec, query.shape[1], key.shape[1]):
    queries = _group(query[:, rows], num_kv_heads)
    bars = _group(output_bar[:, rows], num_kv_heads)
    scores, slope = _scores(spec, queries, keys[:, :, columns], group)
    weights = jnp.exp(scores - log_sum_exp[:, :, :, rows])
    visible = _visible(spec, rows, columns, query_ids, key_ids)
    if visible is not None:
      weights = jnp.where(visible, weights, 0.0)
    weights_bar = _dot("bkth,bksh->bkts", bars, values[:, :, columns]).reshape(weights.shape)
    scores_bar = weights * (weights_bar - delta[:, :, :, rows]) * spec.scale
    if slope is not None:
      scores_bar = scores_bar * slope
    scores_bar = _as_rows(scores_bar.astype(query.dtype))
    query_bar = _dot("bkts,bksh->bkth", scores_bar, keys[:, :, columns])
    query_bars.append(_ungroup(query_bar, num_heads).astype(query.dtype))
    weights = _as_rows(weights.astype(value.dtype))
    key_bar = key_bar.at[..., columns].add(_dot("bkth,bkts->bkhs", queries, scores_bar))
    value_bar = value_bar.at[..., columns].add(_dot("bkth,bkts->bkhs", bars, weights))
  return (
    jnp.concatenate(query_bars, axis=1),
    key_bar.transpose(0, 3, 1, 2).astype(key.dtype),
    value_bar.transpose(0, 3, 1, 2).astype(value.dtype),
  )


def _blocks(spec: Spec, length: int, key_length: int) -> Iterator[tuple[slice, slice]]:
  """Yields ranges of queries, each with the range of keys that any of them sees."""
  size = max(_BLOCK, -(-length // _MAX_BLOCKS))
  for start in range(0, length, size):
    stop = min(start + size, length)
    low, high = keys_seen_by_any(spec.span, start, stop - 1, key_length)
    low = min(low, high - 1)  # a query that sees nothing masks one key
    yield slice(start, stop), slice(low, high)


def _scores(
  spec: Spec, queries: Float[Array, "B K R H"], keys: Float[Array, "B K s H"], group: int
) -> tuple[Float[Array, "B K G t s"], Float[Array, "B K G t s"] | None]:
  """Returns the scores of R = G * t query rows, and the slope of the soft cap, if any."""
  scores = _dot("bkth,bksh->bkts", queries, keys) * spec.scale
  scores = scores.reshape(*keys.shape[:2], group, -1, keys.shape[2])
  if spec.logits_soft_cap is None:
    return scores, None
  return soft_cap(scores, spec.logits_soft_cap)


def _visible(
  spec: Spec,
  rows: slice,
  columns: slice,
  query_ids: Int[Array, "B T"] | None,
  key_ids: Int[Array, "B S"] | None,
) -> Bool[Array, "b 1 1 t s"] | None:
  """Returns which keys each query of a block sees, or None if all."""
  distance = (
    jnp.arange(columns.start, columns.stop)[None] - jnp.arange(rows.start, rows.stop)[:, None]
  )
  visible = within(spec.span, distance)  # [t, s]
  visible = None if visible is None else visible[None]
  if query_ids is not None:
    same = query_ids[:, rows, None] == key_ids[:, None, columns]  # [B, t, s]
    visible = same if visible is None else visible & same
  return None if visible is None else visible[:, None, None]


def _by_head(x: Float[Array, "B S K H"]) -> Float[Array, "B K S H"]:
  return x.swapaxes(1, 2)


def _group(x: Float[Array, "B t N H"], num_kv_heads: int) -> Float[Array, "B K R H"]:
  """Merges the query heads of a KV head into the rows of one matrix: R = G * t."""
  batch, _, _, size = x.shape
  return x.swapaxes(1, 2).reshape(batch, num_kv_heads, -1, size)


def _ungroup(x: Float[Array, "B K R H"], num_heads: int) -> Float[Array, "B t N H"]:
  """Inverts `_group`."""
  batch, _, _, size = x.shape
  return x.reshape(batch, num_heads, -1, size).swapaxes(1, 2)


def _as_rows(x: Float[Array, "B K G t s"]) -> Float[Array, "B K R s"]:
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _dot(equation: str, left: Array, right: Array) -> Array:
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
