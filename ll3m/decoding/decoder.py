"""The decoder with a key-value cache.

Dimensions: B batch, T prompt length, C cache length, D model, K KV heads, H head dim,
V vocabulary, L layers.

The prompts of a batch are padded on the left, so that all rows write the same slot of the cache
and the last column is every row's newest. A column counts padding; a row's positions count from
its own start. The cache is a ring: column i lives in slot i mod C. Under a sliding window C is
no longer than the window, so that a full ring holds just what a query sees.

One compiled layer is called L times: compiling takes a second at any depth (all of SmolLM2's
layers in one program: twelve), and XLA:CPU runs it no slower.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ll3m.core.config import ModelConfig
from ll3m.models.attention import Attend, causal_attention
from ll3m.models.kernels import DEFAULT_KERNELS, Kernels
from ll3m.models.layers import Norm
from ll3m.models.transformer import Embed, Params, block, logits
from ll3m_kernels import flash_attention

# Matrices that read the same input, and the one that they become.
JOINED = {
  "attention/query_key_value": ("attention/query", "attention/key", "attention/value"),
  "mlp/gate_up": ("mlp/gate", "mlp/up"),
}

# A layer's keys and values. Heads come first, as the product with the queries wants them: else
# XLA:CPU copies the whole cache at every step.
LayerCache = tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]


class Weights(NamedTuple):
  """Parameters, taken apart for decoding by `unstack`.

  Attributes:
    layers: of each layer, with joined matrices.
    ends: embedding, final norm and head.
  """

  layers: list[Params]
  ends: Params


class Decoder(NamedTuple):
  """The two halves of generation; each calls compiled functions, and is not to be compiled.

  Attributes:
    prefill: (weights, tokens [B, T], starts [B], cache_length) -> (hidden, cache). Starts are
      the columns of the rows' first tokens.
    step: (weights, cache, tokens [B], column, starts) -> (hidden, cache): feeds each row's newest
      token, which stands in that column. The old cache is consumed.
    logits: (weights.ends, hidden [B, D]) -> float32 [B, V] of the token that follows.
  """

  prefill: Callable[..., tuple[Float[Array, "B D"], list[LayerCache]]]
  step: Callable[..., tuple[Float[Array, "B D"], list[LayerCache]]]
  logits: Callable[[Params, Float[Array, "B D"]], Float[Array, "B V"]]


def make_decoder(
  config: ModelConfig, *, dtype: Any = jnp.float32, kernels: Kernels = DEFAULT_KERNELS
) -> Decoder:
  """Builds the functions.

  Args:
    config: the architecture.
    dtype: of activations and cache.
    kernels: how to call them.
  """

  def apply(params: Params, function: Callable, *args: Any) -> Any:
    return hk.without_apply_rng(hk.transform(function)).apply(params, *args)

  def layer(params, x, columns, starts, attend: Attend):
    positions = jnp.maximum(columns - starts[:, None], 0)
    return apply(
      params,
      lambda x: block(config, x, positions, attend, fused=True, kernels=kernels),
      x,
    )

  @jax.jit
  def embed(ends, tokens):
    return apply(ends, lambda tokens: Embed(config, dtype, kernels=kernels)(tokens), tokens)

  @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
  def prefill_layer(params, x, starts, cache_length):
    columns = jnp.arange(x.shape[1])[None]
    segment_ids = (columns >= starts[:, None]).astype(jnp.int32)

    def attend(query, key, value):
      attended = causal_attention(
        config, query, key, value, segment_ids=segment_ids, kernels=kernels
      )
      return attended, (_to_ring(key, cache_length), _to_ring(value, cache_length))

    return layer(params, x, columns, starts, attend)

  @functools.partial(jax.jit, donate_argnums=(1, 2))
  def step_layer(params, cache, x, column, starts):
    cache_length = cache[0].shape[2]
    slot = column % cache_length
    # The newest column in each slot, this step's included; negative where none has been.
    held = column - (slot - jnp.arange(cache_length)) % cache_length
    visible = (held[None] >= starts[:, None]).astype(jnp.int32)  # [B, C]
    segment_ids = (jnp.ones_like(starts)[:, None], visible)

    def attend(query, key, value):
      kept = tuple(
        jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), slot, axis=2)
        for old, new in zip(cache, (key, value), strict=True)
      )
      # Without it XLA:CPU fuses the update twice, into the result and into the product, and copies
      # the whole cache four times: 64 ms a step of SmolLM2 at 4096 columns, and 27 with it.
      kept = jax.lax.optimization_barrier(kept)
      keys, values = (array.swapaxes(1, 2) for array in kept)
      attended = flash_attention(query, keys, values, segment_ids=segment_ids, **kernels.options)
      return attended, kept

    return layer(params, x, column[None, None], starts, attend)

  def prefill(weights, tokens, starts, cache_length):
    x = embed(weights.ends, tokens)
    cache = []
    for params in weights.layers:
      x, kept = prefill_layer(params, x, starts, cache_length)
      cache.append(kept)
    return x[:, -1], cache

  def step(weights, cache, tokens, column, starts):
    x = embed(weights.ends, tokens[:, None])
    new_cache = []
    for params, kept in zip(weights.layers, cache, strict=True):
      x, kept = step_layer(params, kept, x, column, starts)
      new_cache.append(kept)
    return x[:, -1], new_cache

  def last_logits(ends, hidden):
    norm = lambda x: Norm(config, kernels=kernels, name="final_norm")(x)  # noqa: E731
    return logits(config, ends, apply(ends, norm, hidden[:, None]))[:, 0]

  return Decoder(prefill, step, last_logits)


def unstack(config: ModelConfig, params: Params, dtype: Any) -> Weights:
  """Takes the layers apart and joins the matrices that read the same input.

  XLA:CPU copies a layer's slice out of the stack at every step, and small products do not fill
  its threads: SmolLM2 decoded 12.6 tokens/s stacked, 22 with arrays per layer, 38 joined.

  Args:
    config: the architecture.
    params: stacked over layers, as `models.transformer.make_model` has them.
    dtype: of the result.
  """
  prefix = "layers/"
  stacked = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
  groups = {module: (module,) for module in stacked}
  for joined, members in JOINED.items():
    if all(member in stacked for member in members):
      groups = {k: v for k, v in groups.items() if k not in members} | {joined: members}
  ends = {
    module: {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    for module, arrays in params.items()
    if not module.startswith(prefix)
  }
  # A plain (not gated) network keeps its single matrix: `mlp/up` under either name.
  layers = [
    {
      module: {
        name: jnp.concatenate(
          [jnp.asarray(stacked[member][name][layer], dtype) for member in members], axis=-1
        )
        for name in stacked[members[0]]
      }
      for module, members in groups.items()
    }
    for layer in range(config.num_layers)
  ]
  return Weights(layers, ends)


def _to_ring(columns: Float[Array, "B T K H"], length: int) -> Float[Array, "B K C H"]:
  """Lays the last columns into a ring, with zeros where there is no column yet."""
  columns = columns.swapaxes(1, 2)
  total = columns.shape[2]
  if total <= length:
    return jnp.pad(columns, ((0, 0), (0, 0), (0, length - total), (0, 0)))
  # The first column that is kept is total - length.
  return jnp.roll(columns[:, :, -length:], (total - length) % length, axis=2)
