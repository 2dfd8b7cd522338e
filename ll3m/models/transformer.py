"""The decoder: embedding, a stack of blocks, a final norm and a head.

Dimensions: B batch, T length, D model, V vocabulary, L layers. The model uses Haiku, because its
pure `init` and `apply` functions keep parameters plain pytrees, for kernels, sharding and
checkpoints.

Block parameters are stacked along a leading axis, so that compile time does not depend on depth. If
layers alternate, as in Gemma 3, one step of the loop over layers runs a whole pattern, in which
consecutive layers of one kind are a loop of their own: what layers differ in is static, and each
kind is compiled once. Each kind has a stack of its own, and so have the layers after the last whole
pattern, because a slice of a stack would be copied at every step.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ll3m.core.model_config import LayerKind, ModelConfig
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
  kind: LayerKind,
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  attend: Attend,
  *,
  fused: bool = False,
  kernels: Kernels = DEFAULT_KERNELS,
  is_long: bool | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
  """Applies one layer; must be called within a Haiku transform.

  Args:
    config: The architecture.
    kind: What the layer differs in from others.
    x: The residual stream.
    positions: The tokens' positions, for the rotary embedding.
    attend: The attention function; see `models.attention.Attend`.
    fused: Whether projections that read the same input are one matrix.
    kernels: The kernels' implementation and sharding.
    is_long: Whether texts are long; see `models.rope.rotate`.

  Returns:
    The new residual stream, and the second output of `attend`.
  """
  attention = Attention(config, kind, fused=fused, kernels=kernels, is_long=is_long)
  feed_forward = FeedForward(config, fused=fused)

  def norm(name: str) -> Norm:
    return Norm(config, kernels=kernels, name=name)

  if config.norm_position == "after":
    attended, kept = attention(x, positions, attend)
    x = x + norm("attention_out_norm")(attended)
    return x + norm("mlp_out_norm")(feed_forward(x)), kept
  normed = norm("attention_norm")(x)
  attended, kept = attention(normed, positions, attend)
  if config.parallel_block:
    return x + attended + feed_forward(normed), kept
  if config.norm_position == "both":
    attended = norm("attention_out_norm")(attended)
  normed, x = norm("mlp_norm").add(attended, x)
  out = feed_forward(normed)
  if config.norm_position == "both":
    out = norm("mlp_out_norm")(out)
  return x + out, kept


def head(config: ModelConfig, params: Params) -> Head:
  """Returns the head's parameters, with the embedding as the weight if the model ties them."""
  bias = params["head"]["b"] if config.use_bias else None
  if config.tie_embeddings:
    return Head(params["embed"]["embedding"], "vd", bias)
  return Head(params["head"]["w"], "dv", bias)


def logits(
  config: ModelConfig, params: Params, hidden: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
  """Applies the head with float32 accumulation, and the soft cap, if any."""
  weight, layout, bias = head(config, params)
  equation = "BTD,DV->BTV" if layout == "dv" else "BTD,VD->BTV"
  y = jnp.einsum(equation, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
  if bias is not None:
    y = y + bias.astype(jnp.float32)[None, None]
  cap = config.final_soft_cap
  return y if cap is None else cap * jnp.tanh(y / cap)


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

  def layer(params, x, positions, segment_ids, kind):
    def attend(query, key, value):
      attended = causal_attention(
        config, kind, query, key, value, segment_ids=segment_ids, kernels=kernels
      )
      return attended, None

    run = functools.partial(block, config, kind, attend=attend, kernels=kernels)
    return kernels.constrain(apply(run, params, x, positions)[0])

  if remat != "nothing":
    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], static_argnums=4)

  def init(rng):
    rows = 1 if kernels.sharding is None else kernels.sharding.batch_shards
    create = functools.partial(_create, config, kernels)
    return hk.transform(create).init(rng, jnp.zeros((rows, 1), jnp.int32))

  def hidden(params, tokens, positions=None, segment_ids=None):
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def run(x, stack, own):
      """Runs consecutive layers of one kind, with parameters stacked over them."""

      def step(x, own):
        return layer(own, x, positions, segment_ids, stack.kind), None

      if stack.run == 1 and not is_uniform:
        return step(x, jax.tree.map(operator.itemgetter(0), own))[0]
      return jax.lax.scan(step, x, own)[0]

    repeated = [stack for stack in config.stacks if not stack.is_rest]
    is_uniform = len(repeated) == 1
    x = kernels.constrain(apply(lambda x: Embed(config, dtype, kernels=kernels)(x), params, tokens))
    if is_uniform:
      x = run(x, repeated[0], select(params, repeated[0].prefix))
    else:
      # One step runs all runs of the pattern. [L, ...] -> [repetitions, run, ...]
      groups = [
        jax.tree.map(
          lambda w, stack=stack: w.reshape(-1, stack.run, *w.shape[1:]),
          select(params, stack.prefix),
        )
        for stack in repeated
      ]

      def pattern(x, groups):
        for stack, own in zip(repeated, groups, strict=True):
          x = run(x, stack, own)
        return x, None

      x, _ = jax.lax.scan(pattern, x, groups)
    for stack in config.stacks:
      if stack.is_rest:
        x = run(x, stack, select(params, stack.prefix))
    return apply(lambda x: final_norm(config, kernels)(x), params, x)

  return Model(config, init, hidden, lambda params, x: logits(config, params, x), kernels)


def apply(function: Callable, params: Params, *args: Any) -> Any:
  """Calls a function that uses Haiku modules with their parameters."""
  return hk.without_apply_rng(hk.transform(function)).apply(params, *args)


def select(params: Params, prefix: str) -> Params:
  """Returns the parameters of the modules within another, by their names in it."""
  return {
    module.removeprefix(prefix): arrays
    for module, arrays in params.items()
    if module.startswith(prefix)
  }


def final_norm(config: ModelConfig, kernels: Kernels) -> Norm:
  """Returns the norm before the head."""
  return Norm(config, kernels=kernels, name="final_norm")


def _create(config: ModelConfig, kernels: Kernels, tokens: Int[Array, "B T"]) -> None:
  """Creates all parameters."""

  def layer(x):
    attend = lambda query, key, value: (query, None)  # noqa: E731
    kind = config.pattern[0]  # kinds have the same parameters
    return block(config, kind, x, jnp.zeros_like(tokens), attend, kernels=kernels)[0]

  x = Embed(config, jnp.float32, kernels=kernels)(tokens)
  for stack in config.stacks:
    x = hk.layer_stack(len(stack.layers), name=stack.prefix.rstrip("/"))(layer)(x)
  _HeadParameters(config)()
  final_norm(config, kernels)(x)


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
