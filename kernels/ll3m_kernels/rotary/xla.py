"""Rotary embeddings in plain jnp: the implementation "xla", for any platform and dtype."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ll3m_kernels.rotary.angles import Rotation, cos_sin, frequencies


def rotate(
  rotation: Rotation,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
  """Rotates queries and keys; see `rotary_embedding`."""
  whole, rest = (jnp.asarray(x)[None, None, None] for x in frequencies(rotation))
  cos, sin = cos_sin(rotation, positions[:, :, None, None], whole, rest)  # [B, T, 1, R/2]
  return _turn(query, cos, sin), _turn(key, cos, sin)


def _turn(x: Array, cos: Array, sin: Array) -> Array:
  half = cos.shape[-1]
  wide = x[..., : 2 * half].astype(jnp.float32)
  first, second = wide[..., :half], wide[..., half:]
  parts = [
    (first * cos - second * sin).astype(x.dtype),
    (second * cos + first * sin).astype(x.dtype),
  ]
  if x.shape[-1] > 2 * half:
    parts.append(x[..., 2 * half :])
  return jnp.concatenate(parts, axis=-1)
