"""Attention and its gradients in float64 NumPy, computed from the definition.

Dimensions: B batch, T queries, S keys, N heads, K KV heads, H and W head dims of keys and values.
"""

from typing import Any, NamedTuple

import numpy as np

UNSEEN = -1e30  # the log-sum-exp of a query that sees no key


class Attended(NamedTuple):
  output: np.ndarray  # [B, T, N, W]
  log_sum_exp: np.ndarray  # [B, N, T]
  query_bar: np.ndarray
  key_bar: np.ndarray
  value_bar: np.ndarray


def attention(
  query: Any,
  key: Any,
  value: Any,
  output_bar: Any,
  log_sum_exp_bar: Any,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  local_window_size: Any = None,
  segment_ids: Any = None,
  logits_soft_cap: float | None = None,
) -> Attended:
  """Returns output, log-sum-exp and the gradients for the cotangents of both.

  A query that sees no key has output 0 and no gradient.
  """
  query, key, value, output_bar, log_sum_exp_bar = (
    np.asarray(x, np.float64) for x in (query, key, value, output_bar, log_sum_exp_bar)
  )
  (_, length, num_heads, head_dim), (num_keys, num_kv_heads) = query.shape, key.shape[1:3]
  group = num_heads // num_kv_heads
  scale = head_dim**-0.5 if scale is None else scale
  # [B, N, length, size] for `np.matmul`: `np.einsum` uses no BLAS where there are batch dimensions.
  query, key, value, output_bar = (x.swapaxes(1, 2) for x in (query, key, value, output_bar))
  keys, values = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
  scores = scale * query @ keys.mT
  slope = 1.0
  if logits_soft_cap is not None:
    capped = np.tanh(scores / logits_soft_cap)
    scores, slope = logits_soft_cap * capped, 1 - capped**2
  t, s = np.arange(length)[:, None], np.arange(num_keys)[None]
  visible = np.ones((length, num_keys), bool)
  if is_causal:
    visible &= s <= t
  if local_window_size is not None:
    left, right = np.broadcast_to(local_window_size, 2)
    visible &= (s >= t - left) & (s <= t + right)
  visible = visible[None, None]
  if segment_ids is not None:
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    query_ids, key_ids = (np.asarray(ids) for ids in pair)
    visible = visible & (query_ids[:, None, :, None] == key_ids[:, None, None, :])
  scores = np.where(visible, scores, -np.inf)
  sees_any = np.broadcast_to(visible, scores.shape).any(-1, keepdims=True)
  m = np.where(sees_any, scores.max(-1, keepdims=True), 0.0)
  weights = np.exp(scores - m)
  l = np.where(sees_any, weights.sum(-1, keepdims=True), 1.0)
  weights /= l
  log_sum_exp = np.where(sees_any, m + np.log(l), UNSEEN)[..., 0]
  weights_bar = output_bar @ values.mT
  inner = (weights_bar * weights).sum(-1, keepdims=True)
  scores_bar = weights * (weights_bar - inner + log_sum_exp_bar[..., None]) * slope * scale

  def of_keys(x):
    return x.reshape(x.shape[0], num_kv_heads, group, *x.shape[2:]).sum(2).swapaxes(1, 2)

  return Attended(
    (weights @ values).swapaxes(1, 2),
    log_sum_exp,
    (scores_bar @ keys).swapaxes(1, 2),
    of_keys(scores_bar.mT @ query),
    of_keys(weights.mT @ output_bar),
  )
