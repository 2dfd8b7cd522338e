"""The soft cap of logits and scores (Gemma Team, 2024, Gemma 2), for plain jnp and kernels."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_cap(x: Float[Array, "..."], cap: float) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Returns cap * tanh(x / cap) and its slope.

  The slope is 4 e / (1 + e)^2 with e = exp(-2 |x / cap|). It equals 1 - tanh^2, but stays accurate
  where tanh is almost 1 and the difference cancels. An unused slope is eliminated by the compiler.

  Args:
    x: Logits or scores, in float32.
    cap: Soft cap; positive.
  """
  ratio = x * (1.0 / cap)
  e = jnp.exp(-2.0 * jnp.abs(ratio))
  half = 1.0 / (1.0 + e)
  return cap * jnp.tanh(ratio), 4.0 * e * half * half
