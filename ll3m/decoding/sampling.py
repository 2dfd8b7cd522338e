"""Samples the next token from its logits.

Dimensions: B batch, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling settings: temperature first, then top-k, then top-p of the remaining tokens.

  Attributes:
    temperature: Divisor of the logits; 0 selects the most likely token.
    top_k: Number of most likely tokens to sample from; 0 for all.
    top_p: Probability mass of the most likely tokens to sample from, including the token that
      reaches it (Holtzman et al., 2020); 1 for all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not math.isfinite(self.temperature) or self.temperature < 0:
      raise ValueError(f"`temperature` must be a finite number, at least 0, got {self.temperature}")
    if self.top_k < 0:
      raise ValueError(f"`top_k` must be at least 0, got {self.top_k}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}")
    if self.temperature == 0 and (self.top_k or self.top_p < 1):
      raise ValueError(
        f"`top_k` ({self.top_k}) and `top_p` ({self.top_p}) apply to sampling only, but "
        "`temperature`=0 does not sample; give a temperature above 0"
      )


def sample(
  logits: Float[Array, "B V"],
  seeds: UInt[Array, " B"],
  positions: Int[Array, " B"],
  sampling: Sampling,
) -> Int[Array, " B"]:
  """Samples a token for each row.

  A row's token depends only on its own logits, seed and position, not on other rows.

  Args:
    logits: The logits in float32; tokens with -inf are never sampled.
    seeds: The seed of each row.
    positions: The position of the sampled token in its row; differs between samples of a row.
    sampling: The sampling settings.

  Returns:
    The tokens in int32.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # Subtract the maximum, so that a tiny temperature gives 0 and -inf instead of inf - inf.
  scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
  scaled = scaled / max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
  tokens = None
  if sampling.top_k or sampling.top_p < 1:
    size = logits.shape[-1]
    scaled, tokens = jax.lax.top_k(scaled, min(sampling.top_k or size, size))  # most likely first
  if sampling.top_p < 1:
    probabilities = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The most likely token is always kept.
    kept = (before < sampling.top_p).at[:, 0].set(True)
    scaled = jnp.where(kept, scaled, -jnp.inf)
  keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(seeds, positions)
  choice = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
  if tokens is None:
    return choice
  return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
