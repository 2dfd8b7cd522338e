"""Linear layers, norms and the feed-forward network.

Dimensions: B batch, T length, M = B * T, D model, F feed-forward, V vocabulary. Parameters are cast
to the activations' dtype at each use, so they may be stored in another dtype.
"""

from collections.abc import Callable, Mapping

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m.core.model_config import ModelConfig
from ll3m.models.kernels import Kernels
from ll3m_kernels import add_layer_norm, add_rms_norm, layer_norm, rms_norm

# GPT-2's initialisation (Radford et al., 2019), also used in the families' published configs.
INIT_STDDEV = 0.02

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Linear(hk.Module):
  """The linear layer x @ w + b, applied to the rows of a matrix.

  The input is [M, I] rather than [B, T, I]: if w's gradient sums over both B and T instead of over
  rows, XLA:CPU first copies the transposed operands, which took a fifth of a training step.
  """

  def __init__(self, size: int, *, use_bias: bool, stddev: float = INIT_STDDEV, name: str):
    """Creates the module.

    Args:
      size: The size of the output.
      use_bias: Whether the layer has a bias.
      stddev: The standard deviation of the initial w.
      name: The name of the module.
    """
    super().__init__(name=name)
    self._size = size
    self._use_bias = use_bias
    self._stddev = stddev

  def __call__(self, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
    """Returns the projected rows."""
    w = hk.get_parameter(
      "w", (x.shape[-1], self._size), init=hk.initializers.TruncatedNormal(self._stddev)
    )
    y = x @ w.astype(x.dtype)
    if self._use_bias:
      y = y + hk.get_parameter("b", (self._size,), init=jnp.zeros).astype(x.dtype)[None]
    return y


class Norm(hk.Module):
  """RMSNorm, Gemma's RMSNorm or LayerNorm, optionally fused with the residual addition before."""

  def __init__(self, config: ModelConfig, *, kernels: Kernels, name: str):
    """Creates the module.

    Args:
      config: The architecture.
      kernels: The kernels' implementation and sharding.
      name: The name of the module.
    """
    super().__init__(name=name)
    self._config = config
    self._kernels = kernels

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns norm(x)."""
    plain, _ = self._functions(x.shape[-1])
    return plain(x)

  def add(
    self, x: Float[Array, "*B D"], residual: Float[Array, "*B D"]
  ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns (norm(x + residual), x + residual)."""
    _, fused = self._functions(x.shape[-1])
    return fused(x, residual)

  def _functions(self, size: int) -> tuple[Callable, Callable]:
    config = self._config
    # The weight is (offset + scale), which is initially 1 in every family.
    start = hk.initializers.Constant(1.0 - config.norm_scale_offset)
    weights = {"scale": hk.get_parameter("scale", (size,), init=start)}
    options = {"epsilon": config.norm_epsilon, **self._kernels.options}
    if config.norm == "layer":
      weights["bias"] = hk.get_parameter("bias", (size,), init=jnp.zeros)
      plain, fused = layer_norm, add_layer_norm
    else:
      options["scale_offset"] = config.norm_scale_offset
      plain, fused = rms_norm, add_rms_norm
    return (
      lambda x: plain(x, **weights, **options),
      lambda x, residual: fused(x, residual, **weights, **options),
    )


class FeedForward(hk.Module):
  """The gated (SwiGLU, GeGLU) or plain feed-forward network."""

  def __init__(self, config: ModelConfig, *, fused: bool, name: str = "mlp"):
    """Creates the module.

    Args:
      config: The architecture.
      fused: Whether gate and up are one matrix (see `ll3m.decoding.decode_params`).
      name: The name of the module.
    """
    super().__init__(name=name)
    self._config = config
    self._fused = fused

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the output before the residual addition."""
    config = self._config
    activation = _ACTIVATIONS[config.activation]
    names = ("gate", "up") if config.gated_mlp else ("up",)
    projected = projections(
      x.reshape(-1, x.shape[-1]),
      names,
      (config.d_ff,) * len(names),
      use_bias=config.use_bias,
      fused=self._fused,
    )
    # Recompute the activation's intermediate values in the backward pass: storing them takes six
    # [B * T, F] per layer instead of two, and recomputing is cheaper.
    hidden = jax.checkpoint(_activate, static_argnums=0, prevent_cse=False)(
      activation, *projected
    )  # [B * T, F]
    out = Linear(
      x.shape[-1], use_bias=config.use_bias, stddev=residual_stddev(config), name="down"
    )(hidden)
    return out.reshape(x.shape)


def _activate(activation: Callable[[Array], Array], gate: Array, up: Array | None = None) -> Array:
  return activation(gate) if up is None else activation(gate) * up


def projections(
  x: Float[Array, "M D"],
  names: tuple[str, ...],
  sizes: tuple[int, ...],
  *,
  use_bias: bool,
  fused: bool,
) -> list[Array]:
  """Applies several linear layers to x; if fused, as one matrix whose name joins theirs."""
  if not fused:
    return [
      Linear(size, use_bias=use_bias, name=name)(x) for name, size in zip(names, sizes, strict=True)
    ]
  joined = Linear(sum(sizes), use_bias=use_bias, name="_".join(names))(x)
  ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
  return jnp.split(joined, ends, axis=-1)


def residual_stddev(config: ModelConfig) -> float:
  """Returns the initial stddev of weights that feed the residual stream (Radford et al., 2019)."""
  return INIT_STDDEV * (2 * config.num_layers) ** -0.5
