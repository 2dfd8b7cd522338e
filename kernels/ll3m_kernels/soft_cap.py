"""The soft cap of logits and scores (Gemma Team, 2024, Gemma 2), in plain jnp and in kernels."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def soft_cap(x: Float[Array, "..."], cap: float) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Returns cap * tanh(x / cap), and its slope.

  The slope is 4 e / (1 + e)^2 with e = exp(-2 |x / cap|): 1 - tanh^2, exact also where tanh is
  almost 1, and the difference would have no digits left. Who has no use for it does not pay for it.

  Args:
    x: in float32.
    cap: positive.
  """
  ratio = x * (1.0 / cap)
  e = jnp.exp(-2.0 * jnp.abs(ratio))
  half = 1.0 / (1.0 + e)
  return cap * jnp.tanh(ratio), 4.0 * e * half * half
