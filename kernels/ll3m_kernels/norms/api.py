"""The public norms: they check their arguments and choose an implementation.

RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba et al., 2016), with or without the residual
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
    x: the activations.
    scale: the weight.
    epsilon: added to the mean square; positive.
    scale_offset: added to the weight in float32; 1.0 for Gemma, whose weights are stored less 1.
    implementation: see `dispatch.resolve`. The kernel serves bfloat16 and float32.
    sharding: how x lies on a mesh: its first dimension may be split, weights may not.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes, dtypes or options that do not fit.
    NotImplementedError: the named implementation cannot serve an argument, or this is
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
    x: the activations.
    scale: the weight.
    bias: added last, if given.
    epsilon: added to the (biased) variance; positive.
    implementation: see `dispatch.resolve`. The kernel serves bfloat16 and float32.
    sharding: how x lies on a mesh: its first dimension may be split, weights may not.

  Returns:
    The normalised activations, in x's dtype.

  Raises:
    ValueError: shapes, dtypes or options that do not fit.
    NotImplementedError: the named implementation cannot serve an argument, or this is
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
    x: the block's output.
    residual: the residual stream, of x's dtype.
    scale: as in `rms_norm`, like all that follow.
    epsilon: as there.
    scale_offset: as there.
    implementation: as there.
    sharding: as there.

  Returns:
    (normed, sum): the normalised sum, and the sum rounded to x's dtype, which is also what is
    normalised.

  Raises:
    ValueError: shapes, dtypes or options that do not fit.
    NotImplementedError: as in `rms_norm`.
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
    x: the block's output.
    residual: the residual stream, of x's dtype.
    scale: as in `layer_norm`, like all that follow.
    bias: as there.
    epsilon: as there.
    implementation: as there.
    sharding: as there.

  Returns:
    (normed, sum): the normalised sum, and the sum rounded to x's dtype, which is also what is
    normalised.

  Raises:
    ValueError: shapes, dtypes or options that do not fit.
    NotImplementedError: as in `layer_norm`.
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
