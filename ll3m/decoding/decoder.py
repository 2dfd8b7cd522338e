"""The decoder with a key-value cache.

Dimensions: B batch, T prompt length, C cache length, D model, K KV heads, H head dim,
V vocabulary, L layers.

The prompts of a batch are padded on the left, so that all rows write the same slot of the cache,
and the last column holds each row's newest token. Columns include the padding; a row's positions
count from its first token. The cache is a ring buffer: column i is in slot i mod C. With a sliding
window, C is at most the window, so a full ring holds exactly the columns that a query sees.

One compiled layer is called L times. Compiling takes a second at any depth, instead of twelve for
all of SmolLM2's layers in one program, and XLA:CPU runs it no slower.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ll3m.core.model_config import ModelConfig
from ll3m.decoding.decode_params import joins
from ll3m.models.attention import Attend, causal_attention
from ll3m.models.kernels import DEFAULT_KERNELS, Kernels
from ll3m.models.layers import Norm
from ll3m.models.transformer import Embed, Params, block, logits
from ll3m_kernels import Sharding, flash_attention

# A layer's keys and values. Heads precede columns, as in the product with the queries; otherwise
# XLA:CPU copies the whole cache at every step.
LayerCache = tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]


class Decoder(NamedTuple):
  """The functions of generation. They call compiled functions; do not jit prefill and step.

  Attributes:
    prefill: Function (weights, tokens [B, T], starts [B], cache_length) -> (hidden, cache). Starts
      are the columns of the rows' first tokens.
    step: Function (weights, cache, tokens [B], column, starts) -> (hidden, cache). It processes
      each row's newest token, which is in the given column. The old cache is donated.
    logits: Function (weights.ends, hidden [B, D]) -> float32 [B, V], the next token's logits.
  """

  prefill: Callable[..., tuple[Float[Array, "B D"], list[LayerCache]]]
  step: Callable[..., tuple[Float[Array, "B D"], list[LayerCache]]]
  logits: Callable[[Params, Float[Array, "B D"]], Float[Array, "B V"]]


def make_decoder(
  config: ModelConfig, *, dtype: Any = jnp.float32, kernels: Kernels = DEFAULT_KERNELS
) -> Decoder:
  """Builds the functions.

  Args:
    config: The architecture.
    dtype: The dtype of activations and cache.
    kernels: The kernels' implementation and sharding. On a mesh, weights must be sharded as
      `decode_params.shardings` returns, and B must be a multiple of dp x fsdp.
  """
  joined = joins(kernels)

  def apply(params: Params, function: Callable, *args: Any) -> Any:
    return hk.without_apply_rng(hk.transform(function)).apply(params, *args)

  def layer(params, x, columns, starts, attend: Attend):
    positions = jnp.maximum(columns - starts[:, None], 0)
    y, kept = apply(
      params,
      lambda x: block(config, x, positions, attend, fused=joined, kernels=kernels),
      x,
    )
    return kernels.constrain(y), kept

  def keep(array):
    if kernels.sharding is None:
      return array
    return jax.lax.with_sharding_constraint(array, cache_placement(config, kernels.sharding))

  @jax.jit
  def embed(ends, tokens):
    embed = lambda tokens: Embed(config, dtype, kernels=kernels)(tokens)  # noqa: E731
    return kernels.constrain(apply(ends, embed, tokens))

  @functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
  def prefill_layer(params, x, starts, cache_length):
    columns = jnp.arange(x.shape[1])[None]
    segment_ids = (columns >= starts[:, None]).astype(jnp.int32)

    def attend(query, key, value):
      attended = causal_attention(
        config, query, key, value, segment_ids=segment_ids, kernels=kernels
      )
      return attended, tuple(keep(_to_ring(x, cache_length)) for x in (key, value))

    return layer(params, x, columns, starts, attend)

  @functools.partial(jax.jit, donate_argnums=(1, 2))
  def step_layer(params, cache, x, column, starts):
    cache_length = cache[0].shape[2]
    slot = column % cache_length
    # The newest column in each slot, including this step's; negative for empty slots.
    held = column - (slot - jnp.arange(cache_length)) % cache_length
    visible = (held[None] >= starts[:, None]).astype(jnp.int32)  # [B, C]
    segment_ids = (jnp.ones_like(starts)[:, None], visible)

    def attend(query, key, value):
      kept = tuple(
        keep(jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), slot, axis=2))
        for old, new in zip(cache, (key, value), strict=True)
      )
      # Without the barrier, XLA:CPU fuses the update twice, into the result and into the product,
      # and copies the whole cache four times: 64 ms per SmolLM2 step at 4096 columns instead of 27.
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


def cache_placement(config: ModelConfig, sharding: Sharding) -> NamedSharding:
  """Returns the sharding of keys and values [B, K, C, H] over rows, and over heads if divisible."""
  divides = config.num_kv_heads % sharding.head_shards == 0
  spec = PartitionSpec(sharding.batch_axes, sharding.head_axis if divides else None)
  return NamedSharding(sharding.mesh, spec)


def _to_ring(columns: Float[Array, "B T K H"], length: int) -> Float[Array, "B K C H"]:
  """Returns the last columns as a ring buffer, with zeros in empty slots."""
  columns = columns.swapaxes(1, 2)
  total = columns.shape[2]
  if total <= length:
    return jnp.pad(columns, ((0, 0), (0, 0), (0, length - total), (0, 0)))
  # The first column in the ring is total - length.
  return jnp.roll(columns[:, :, -length:], (total - length) % length, axis=2)
