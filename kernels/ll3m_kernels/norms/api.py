"""The public norms: argument checks and the choice of implementation.

RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba et al., 2016), with or without a residual
addition before them. Statistics and the affine part are computed in float32; outputs have the
input's dtype.
"""

from jaxtyping import Array, Float

from ll3m_kernels.norms.plan import make_plan
from ll3m_kernels.norms.vjp import add_norm, norm
from ll3m_kernels.sharding import Sharding, vary_alike


def rms_norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> Float[Array, "*B D"]:
  """Normalises by the root mean square: x / sqrt(mean(x^2) + epsilon) * (scale_offset + scale).

  Args:
    x: Activations.
    scale: Learned scale.
    epsilon: Constant added to the mean square; positive.
    scale_offset: Constant added to the scale in float32; 1.0 for Gemma, which stores scale - 1.
    implementation: See `dispatch.resolve`. The kernel supports bfloat16 and float32.
    sharding: Layout of x on a mesh. Its first dimension may be split, weights may not.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: A shape, dtype or option is invalid.
    NotImplementedError: The named implementation does not support an argument, or the call is
      differentiated twice.
  """
  plan = make_plan(
    "rms_norm",
    x=x,
    scale=scale,
    epsilon=epsilon,
    scale_offset=scale_offset,
    implementation=implementation,
    sharding=sharding,
  )
  return norm(plan.static, *vary_alike(*plan.arrays))


def layer_norm(
  x: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None = None,
  *,
  epsilon: float = 1e-5,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> Float[Array, "*B D"]:
  """Normalises to mean 0 and variance 1: (x - mean) / sqrt(var + epsilon) * scale + bias.

  Args:
    x: Activations.
    scale: Learned scale.
    bias: Learned bias, if any; added last.
    epsilon: Constant added to the (biased) variance; positive.
    implementation: See `dispatch.resolve`. The kernel supports bfloat16 and float32.
    sharding: Layout of x on a mesh. Its first dimension may be split, weights may not.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: A shape, dtype or option is invalid.
    NotImplementedError: The named implementation does not support an argument, or the call is
      differentiated twice.
  """
  plan = make_plan(
    "layer_norm",
    x=x,
    scale=scale,
    bias=bias,
    epsilon=epsilon,
    implementation=implementation,
    sharding=sharding,
  )
  return norm(plan.static, *vary_alike(*plan.arrays))


def add_rms_norm(
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  *,
  epsilon: float = 1e-6,
  scale_offset: float = 0.0,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Adds a block's output to the residual stream and normalises the sum (see `rms_norm`).

  Args:
    x: Output of the block.
    residual: Residual stream, in x's dtype.
    scale: See `rms_norm`.
    epsilon: See `rms_norm`.
    scale_offset: See `rms_norm`.
    implementation: See `rms_norm`.
    sharding: See `rms_norm`.

  Returns:
    (normed, sum): The normalised sum and the sum. The sum is rounded to x's dtype before it is
    normalised.

  Raises:
    ValueError: A shape, dtype or option is invalid.
    NotImplementedError: See `rms_norm`.
  """
  plan = make_plan(
    "add_rms_norm",
    x=x,
    residual=residual,
    scale=scale,
    epsilon=epsilon,
    scale_offset=scale_offset,
    implementation=implementation,
    sharding=sharding,
  )
  return add_norm(plan.static, *vary_alike(*plan.arrays))


def add_layer_norm(
  x: Float[Array, "*B D"],
  residual: Float[Array, "*B D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None = None,
  *,
  epsilon: float = 1e-5,
  implementation: str | None = None,
  sharding: Sharding | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
  """Adds a block's output to the residual stream and normalises the sum (see `layer_norm`).

  Args:
    x: Output of the block.
    residual: Residual stream, in x's dtype.
    scale: See `layer_norm`.
    bias: See `layer_norm`.
    epsilon: See `layer_norm`.
    implementation: See `layer_norm`.
    sharding: See `layer_norm`.

  Returns:
    (normed, sum): The normalised sum and the sum. The sum is rounded to x's dtype before it is
    normalised.

  Raises:
    ValueError: A shape, dtype or option is invalid.
    NotImplementedError: See `layer_norm`.
  """
  plan = make_plan(
    "add_layer_norm",
    x=x,
    residual=residual,
    scale=scale,
    bias=bias,
    epsilon=epsilon,
    implementation=implementation,
    sharding=sharding,
  )
  return add_norm(plan.static, *vary_alike(*plan.arrays))
