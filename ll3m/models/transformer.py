"""The decoder: embedding, a stack of blocks, a final norm and a head.

Dimensions: B batch, T length, D model, V vocabulary, L layers. The model uses Haiku, because its
pure `init` and `apply` functions keep parameters plain pytrees, for kernels, sharding and
checkpoints. Block parameters are stacked along a leading axis L, so that compile time does not
depend on depth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ll3m.core.model_config import ModelConfig
from ll3m.models.attention import Attend, Attention, causal_attention
from ll3m.models.kernels import DEFAULT_KERNELS, Kernels
from ll3m.models.layers import INIT_STDDEV, FeedForward, Norm
from ll3m_kernels import ATTENTION_RESIDUALS

Params = dict[str, dict[str, Array]]

# Checkpoint policies of a layer, by the name of what the backward pass recomputes.
REMAT_POLICIES: dict[str, Callable | None] = {
  "nothing": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_RESIDUALS),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Model(NamedTuple):
  """A decoder as pure functions of its parameters.

  Attributes:
    config: The architecture.
    init: Function (rng) -> parameters in float32.
    hidden: Function (params, tokens [B, T], positions=None, segment_ids=None) -> [B, T, D], the
      input of the head. Positions count from 0 by default; tokens attend within their segment.
    logits: Function (params, hidden [B, T, D]) -> float32 [B, T, V].
    kernels: The kernels' implementation, and the sharding of activations.
  """

  config: ModelConfig
  init: Callable[[Array], Params]
  hidden: Callable[..., Float[Array, "B T D"]]
  logits: Callable[[Params, Array], Float[Array, "B T V"]]
  kernels: Kernels


class Head(NamedTuple):
  """The linear layer from hidden states to logits.

  Attributes:
    weight: The matrix [D, V], or the embedding [V, D] if the model ties them.
    layout: The layout of the weight, "dv" or "vd".
    bias: The bias [V], or None.
  """

  weight: Array
  layout: str
  bias: Array | None


class Embed(hk.Module):
  """The token embedding."""

  def __init__(self, config: ModelConfig, dtype: Any, *, kernels: Kernels, name: str = "embed"):
    """Creates the module.

    Args:
      config: The architecture.
      dtype: The dtype of the activations.
      kernels: The kernels' implementation, and the sharding of activations.
      name: The name of the module.
    """
    super().__init__(name=name)
    self._config = config
    self._dtype = dtype
    self._kernels = kernels

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the embeddings of the tokens."""
    config = self._config
    shape = (config.vocab_size, config.d_model)
    init = hk.initializers.TruncatedNormal(INIT_STDDEV)
    table = self._kernels.whole_rows(hk.get_parameter("embedding", shape, init=init))
    x = table[tokens].astype(self._dtype)
    if config.scale_embeddings:
      x = x * jnp.asarray(config.d_model**0.5, self._dtype)
    return x


def block(
  config: ModelConfig,
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  attend: Attend,
  *,
  fused: bool = False,
  kernels: Kernels = DEFAULT_KERNELS,
) -> tuple[Float[Array, "B T D"], Any]:
  """Applies one layer; must be called within a Haiku transform.

  Args:
    config: The architecture.
    x: The residual stream.
    positions: The tokens' positions, for the rotary embedding.
    attend: The attention function; see `models.attention.Attend`.
    fused: Whether projections that read the same input are one matrix.
    kernels: The kernels' implementation and sharding.

  Returns:
    The new residual stream, and the second output of `attend`.
  """
  attention = Attention(config, fused=fused, kernels=kernels)
  feed_forward = FeedForward(config, fused=fused)
  normed = Norm(config, kernels=kernels, name="attention_norm")(x)
  attended, kept = attention(normed, positions, attend)
  if config.parallel_block:
    return x + attended + feed_forward(normed), kept
  mlp_norm = Norm(config, kernels=kernels, name="mlp_norm")
  normed, x = mlp_norm.add(attended, x)
  return x + feed_forward(normed), kept


def head(config: ModelConfig, params: Params) -> Head:
  """Returns the head's parameters, with the embedding as the weight if the model ties them."""
  bias = params["head"]["b"] if config.use_bias else None
  if config.tie_embeddings:
    return Head(params["embed"]["embedding"], "vd", bias)
  return Head(params["head"]["w"], "dv", bias)


def logits(
  config: ModelConfig, params: Params, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
  """Applies the head with float32 accumulation."""
  weight, layout, bias = head(config, params)
  equation = "BTD,DV->BTV" if layout == "dv" else "BTD,VD->BTV"
  y = jnp.einsum(equation, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
  return y if bias is None else y + bias.astype(jnp.float32)[None, None]


def make_model(
  config: ModelConfig,
  *,
  dtype: Any = jnp.float32,
  remat: str = "nothing",
  kernels: Kernels = DEFAULT_KERNELS,
) -> Model:
  """Builds the decoder's functions.

  Args:
    config: The architecture.
    dtype: The dtype of the activations; parameters are cast to it at each use.
    remat: What the backward pass recomputes instead of storing it; see `REMAT_POLICIES`.
    kernels: The kernels' implementation, and the sharding of the residual stream [B, T, D].

  Raises:
    ValueError: The remat policy is unknown.
  """
  if remat not in REMAT_POLICIES:
    raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, got {remat!r}")

  def decoder(tokens, positions, segment_ids):
    def attend(query, key, value):
      attended = causal_attention(
        config, query, key, value, segment_ids=segment_ids, kernels=kernels
      )
      return attended, None

    def layer(x):
      return kernels.constrain(block(config, x, positions, attend, kernels=kernels)[0])

    if remat != "nothing":
      layer = hk.remat(layer, policy=REMAT_POLICIES[remat])
    x = kernels.constrain(Embed(config, dtype, kernels=kernels)(tokens))
    x = hk.layer_stack(config.num_layers, name="layers")(layer)(x)
    if hk.running_init():
      _HeadParameters(config)()
    return Norm(config, kernels=kernels, name="final_norm")(x)

  transformed = hk.without_apply_rng(hk.transform(decoder))

  def init(rng):
    rows = 1 if kernels.sharding is None else kernels.sharding.batch_shards
    tokens = jnp.zeros((rows, 1), jnp.int32)
    return transformed.init(rng, tokens, tokens, None)

  def hidden(params, tokens, positions=None, segment_ids=None):
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return transformed.apply(params, tokens, positions, segment_ids)

  return Model(config, init, hidden, lambda params, x: logits(config, params, x), kernels)


class _HeadParameters(hk.Module):
  """Creates the head's parameters; `head` reads them."""

  def __init__(self, config: ModelConfig):
    super().__init__(name="head")
    self._config = config

  def __call__(self) -> None:
    config = self._config
    if not config.tie_embeddings:
      init = hk.initializers.TruncatedNormal(INIT_STDDEV)
      hk.get_parameter("w", (config.d_model, config.vocab_size), init=init)
    if config.use_bias:
      hk.get_parameter("b", (config.vocab_size,), init=jnp.zeros)
