"""The decoder: embedding, a stack of blocks, a final norm and a head.

Dimensions: B batch, T length, D model, V vocabulary, L layers. Haiku, because its pure `init` and
`apply` functions make kernels, sharding and checkpoints plain pytrees. Parameters of the blocks
are stacked, with a leading L, so that compile time does not depend on depth.
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

# What is kept of a layer for the backward pass, by the name of what is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
  "nothing": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_RESIDUALS),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Model(NamedTuple):
  """A decoder as pure functions of its parameters.

  Attributes:
    config: the architecture.
    init: rng -> parameters, float32.
    hidden: (params, tokens [B, T], positions=None, segment_ids=None) -> [B, T, D], what the head
      reads. Positions count from 0 unless given; tokens see only their own segment's.
    logits: (params, hidden [B, T, D]) -> float32 [B, T, V].
    kernels: how these call the kernels, and how activations lie on a mesh.
  """

  config: ModelConfig
  init: Callable[[Array], Params]
  hidden: Callable[..., Float[Array, "B T D"]]
  logits: Callable[[Params, Array], Float[Array, "B T V"]]
  kernels: Kernels


class Head(NamedTuple):
  """What turns hidden states into logits.

  Attributes:
    weight: [D, V], or the embedding [V, D] where they are tied.
    layout: "dv" or "vd", which of the two.
    bias: [V], if the model has one.
  """

  weight: Array
  layout: str
  bias: Array | None


class Embed(hk.Module):
  """The token embedding."""

  def __init__(self, config: ModelConfig, dtype: Any, *, kernels: Kernels, name: str = "embed"):
    """Args: the config; dtype of the activations; how they lie on a mesh."""
    super().__init__(name=name)
    self._config = config
    self._dtype = dtype
    self._kernels = kernels

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Looks the tokens up."""
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
  """Applies one layer; to be called within a Haiku transform.

  Args:
    config: the architecture.
    x: the residual stream.
    positions: of the tokens, for the rotary embedding.
    attend: the attention function; see `models.attention.Attend`.
    fused: the projections that read the same input are one matrix.
    kernels: how to call them.

  Returns:
    The new residual stream, and what `attend` keeps of this layer.
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
  """Returns the head's weights, the embedding where they are tied."""
  bias = params["head"]["b"] if config.use_bias else None
  if config.tie_embeddings:
    return Head(params["embed"]["embedding"], "vd", bias)
  return Head(params["head"]["w"], "dv", bias)


def logits(
  config: ModelConfig, params: Params, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
  """Applies the head in float32 accumulation."""
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
    config: the architecture.
    dtype: of the activations; parameters are cast to it where they are used.
    remat: what the backward pass computes again instead of keeping it; see `REMAT_POLICIES`.
    kernels: how to call them, and how the residual stream [B, T, D] lies on a mesh.

  Raises:
    ValueError: unknown remat policy.
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
