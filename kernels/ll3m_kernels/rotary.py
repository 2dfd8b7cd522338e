"""Rotary position embeddings (Su et al., 2021) in the half-split convention, for long contexts."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ll3m_kernels import dispatch

# A position below 2^20 is cut into two parts of 10 bits, a frequency into its 12 leading bits and
# the rest: the products with the leading bits are then exact in float32's 24.
_POSITION_BITS = 10
_FREQUENCY_BITS = 12


def rotary_embedding(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  positions: Int[Array, "B T"],
  *,
  theta: float = 10_000.0,
  rotary_dim: int | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
  """Rotates queries and keys by their positions.

  The pair (x[i], x[i + R/2]), i < R/2, turns by positions * theta**(-2i/R), with R = rotary_dim;
  the dimensions from R on pass unchanged. The inverse frequencies are rounded to float32, as in
  every published implementation; their products with the positions are not: angles are reduced
  to one turn exactly, so that cos and sin hold at any position up to 2**20.

  Args:
    query: the queries.
    key: the keys.
    positions: each token's position, at least 0.
    theta: base of the frequencies.
    rotary_dim: R, even; the whole head by default.
    implementation: see `dispatch.resolve`.

  Returns:
    The rotated queries and keys, in their own dtypes; the rotation is done in float32.

  Raises:
    ValueError: shapes or a rotary_dim that do not fit.
  """
  head_dim = query.shape[-1]
  rotary_dim = head_dim if rotary_dim is None else rotary_dim
  if query.ndim != 4 or key.ndim != 4 or key.shape[:2] != query.shape[:2]:
    raise ValueError(
      f"query and key must be [B, T, heads, H] with one B and T, got {query.shape} and {key.shape}"
    )
  if key.shape[-1] != head_dim:
    raise ValueError(f"query and key must have one head dim, got {head_dim} and {key.shape[-1]}")
  if positions.shape != query.shape[:2]:
    raise ValueError(f"positions must have shape {query.shape[:2]}, got {positions.shape}")
  if not jnp.issubdtype(positions.dtype, jnp.integer):
    raise ValueError(f"positions must be integers, got {positions.dtype}")
  if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
    raise ValueError(f"rotary_dim must be even and within 2..{head_dim}, got {rotary_dim}")
  dispatch.resolve(implementation)
  cos, sin = _cos_sin(positions, theta, rotary_dim)  # [B, T, 1, R/2]
  return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
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


def _cos_sin(positions: Array, theta: float, rotary_dim: int) -> tuple[Array, Array]:
  """Returns cos and sin of the angles, [B, T, 1, R/2] float32.

  Works in turns instead of radians: whole turns fall away exactly. A plain float32 product
  position * frequency is off by 3e-2 at a million.
  """
  high, low = (part[None, None, None] for part in _turns(theta, rotary_dim))
  coarse = (positions >> _POSITION_BITS << _POSITION_BITS).astype(jnp.float32)[..., None, None]
  fine = (positions & (2**_POSITION_BITS - 1)).astype(jnp.float32)[..., None, None]
  turns = _fraction(coarse * high) + _fraction(fine * high) + (coarse + fine) * low
  angle = _fraction(turns) * np.float32(2 * np.pi)
  return jnp.cos(angle), jnp.sin(angle)


def _fraction(turns: Array) -> Array:
  return turns - jnp.round(turns)


def _turns(theta: float, rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Splits the frequencies, in turns per position, into leading bits and rest; float32 [R/2]."""
  exponent = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
  frequency = (1.0 / theta**exponent).astype(np.float32).astype(np.float64)
  turns = frequency / (2 * np.pi)
  _, exponent2 = np.frexp(turns)
  unit = np.ldexp(1.0, exponent2 - _FREQUENCY_BITS)
  high = np.floor(turns / unit) * unit
  return high.astype(np.float32), (turns - high).astype(np.float32)
