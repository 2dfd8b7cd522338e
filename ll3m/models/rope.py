"""Frequencies of rotary embeddings (Su et al., 2021), and their scaling to longer contexts.

Dimensions: B batch, T length, N query heads, K KV heads, H head dim, R rotated dimensions.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ll3m.core.model_config import ModelConfig
from ll3m.models.kernels import Kernels
from ll3m_kernels import rotary_embedding


def rotate(
  config: ModelConfig,
  rope: str | None,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  positions: Int[Array, "B T"],
  *,
  kernels: Kernels,
  is_long: bool | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
  """Rotates queries and keys by their positions.

  Args:
    config: The architecture.
    rope: The layer's rotary embedding; see `ll3m.core.layer_stacks.LayerKind`.
    query: Queries.
    key: Keys.
    positions: Positions of the tokens.
    kernels: The kernels' implementation and sharding.
    is_long: Whether texts are longer than the original context, which selects longrope's
      frequencies. By default that is so if a position is beyond it, as in transformers.
  """
  if rope is None:
    return query, key
  if rope == "local":
    turn = functools.partial(rotary_embedding, theta=config.rope_local_theta)
  elif config.rope_scaling == "linear":
    turn = functools.partial(
      rotary_embedding, theta=config.rope_theta, scaling_factor=config.rope_scaling_factor
    )
  else:
    turn = functools.partial(
      rotary_embedding,
      inverse_frequencies=inverse_frequencies(config, is_long=False),
      magnitude=magnitude(config),
    )
  options: dict[str, Any] = {"rotary_dim": config.rotary_dim, **kernels.options}
  turn = functools.partial(turn, **options)
  original = config.rope_original_positions
  if rope == "local" or config.rope_scaling != "longrope":
    return turn(query, key, positions)
  turn_long = functools.partial(turn, inverse_frequencies=inverse_frequencies(config, is_long=True))
  if is_long is not None:
    return (turn_long if is_long else turn)(query, key, positions)
  if config.max_positions <= original:
    return turn(query, key, positions)
  return jax.lax.cond(jnp.max(positions) >= original, turn_long, turn, query, key, positions)


def inverse_frequencies(config: ModelConfig, *, is_long: bool) -> tuple[float, ...]:
  """Returns the radians per position of each pair of dimensions, [R/2].

  Args:
    config: An architecture whose rope_scaling is not "linear".
    is_long: Whether the text is longer than the original context, for "longrope".
  """
  exponent = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
  wavelengths = np.float32(config.rope_theta**exponent)
  scale = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[config.rope_scaling]
  return tuple(scale(config, wavelengths, is_long).tolist())


def _llama3(config: ModelConfig, wavelengths: np.ndarray, is_long: bool) -> np.ndarray:
  """Divides low frequencies by the factor, and interpolates up to high ones (Llama 3.1).

  The arithmetic is in float32, as in transformers, whose results the models were trained with.
  """
  del is_long
  low, high = (np.float32(x) for x in config.rope_frequency_factors)
  factor = np.float32(config.rope_scaling_factor)
  frequencies = np.float32(1) / wavelengths
  per_context = config.rope_original_positions * frequencies / np.float32(2 * math.pi)
  smooth = np.clip((per_context - low) / (high - low), 0, 1)
  return (1 - smooth) * frequencies / factor + smooth * frequencies


def _yarn(config: ModelConfig, wavelengths: np.ndarray, is_long: bool) -> np.ndarray:
  """Divides frequencies by a factor that ramps up over the pairs (Peng et al., 2023, YaRN)."""
  del is_long
  slow, fast = config.rope_frequency_factors
  size, pairs = config.rotary_dim, np.arange(len(wavelengths), dtype=np.float32)

  def pair_with(turns: float) -> float:
    """Returns the (fractional) pair that makes this many turns in the original context."""
    turn = config.rope_original_positions / (turns * 2 * math.pi)
    return size * math.log(turn) / (2 * math.log(config.rope_theta))

  first = max(math.floor(pair_with(fast)), 0)
  last = min(math.ceil(pair_with(slow)), size - 1)
  ramp = np.clip((pairs - first) / max(last - first, 1e-3), 0, 1).astype(np.float32)
  interpolated = 1 / (np.float32(config.rope_scaling_factor) * wavelengths)
  return interpolated * ramp + (1 / wavelengths) * (1 - ramp)


def _longrope(config: ModelConfig, wavelengths: np.ndarray, is_long: bool) -> np.ndarray:
  """Divides each frequency by a factor of its own (Ding et al., 2024, LongRoPE)."""
  factors = config.rope_long_factors if is_long else config.rope_short_factors
  return 1 / (np.float32(factors) * wavelengths)


def magnitude(config: ModelConfig) -> float:
  """Returns the factor of rotated queries and keys."""
  factor = config.rope_scaling_factor
  if config.rope_magnitude is not None:
    return config.rope_magnitude
  if config.rope_scaling == "yarn":
    return 0.1 * math.log(factor) + 1
  if config.rope_scaling == "longrope":
    return math.sqrt(1 + math.log(factor) / math.log(config.rope_original_positions))
  return 1.0
