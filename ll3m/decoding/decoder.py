"""The decoder with a key-value cache.

Dimensions: B batch, T prompt length, C cache length, D model, K KV heads, H head dim,
V vocabulary, L layers.

The prompts of a batch are padded on the left, so that all rows write the same slot of the cache,
and the last column holds each row's newest token. Columns include the padding; a row's positions
count from its first token. A layer's cache is a ring buffer: column i is in slot i mod C. In a
layer with a window, C is at most the window, so a full ring holds exactly the columns that a query
sees.

One compiled layer of each kind is called for all layers of that kind. Compiling takes a second at
any depth, instead of twelve for all of SmolLM2's layers in one program, and XLA:CPU runs it no
slower.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ll3m.core.model_config import LayerKind, ModelConfig
from ll3m.decoding.decode_params import joins
from ll3m.models.attention import Attend, causal_attention, score_options
from ll3m.models.kernels import DEFAULT_KERNELS, Kernels
from ll3m.models.transformer import Embed, Params, apply, block, final_norm, logits
from ll3m_kernels import Sharding, flash_attention

# A layer's keys and values. Heads precede columns, as in the product with the queries; otherwise
# XLA:CPU copies the whole cache at every step.
LayerCache = tuple[Float[Array, "B K C H"], Float[Array, "B K C H"]]


class Decoder(NamedTuple):
  """The functions of generation. They call compiled functions; do not jit prefill and step.

  Attributes:
    prefill: Function (weights, tokens [B, T], starts [B], columns, is_long) -> (hidden, cache).
      Starts are the columns of the rows' first tokens; columns is the number that the cache shall
      hold; is_long is that of `models.rope.rotate`.
    step: Function (weights, cache, tokens [B], column, starts, is_long) -> (hidden, cache). It
      processes each row's newest token, which is in the given column. The old cache is donated.
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

  def layer(kind, is_long, params, x, columns, starts, attend: Attend):
    positions = jnp.maximum(columns - starts[:, None], 0)
    run = functools.partial(
      block, config, kind, attend=attend, fused=joined, kernels=kernels, is_long=is_long
    )
    y, kept = apply(run, params, x, positions)
    return kernels.constrain(y), kept

  def keep(array):
    if kernels.sharding is None:
      return array
    return jax.lax.with_sharding_constraint(array, cache_placement(config, kernels.sharding))

  @jax.jit
  def embed(ends, tokens):
    embed = lambda tokens: Embed(config, dtype, kernels=kernels)(tokens)  # noqa: E731
    return kernels.constrain(apply(embed, ends, tokens))

  @functools.partial(jax.jit, static_argnums=(0, 1, 5), donate_argnums=3)
  def prefill_layer(kind, is_long, params, x, starts, columns_kept):
    columns = jnp.arange(x.shape[1])[None]
    segment_ids = (columns >= starts[:, None]).astype(jnp.int32)

    def attend(query, key, value):
      attended = causal_attention(
        config, kind, query, key, value, segment_ids=segment_ids, kernels=kernels
      )
      length = cache_length(kind, columns_kept)
      return attended, tuple(keep(_to_ring(x, length)) for x in (key, value))

    return layer(kind, is_long, params, x, columns, starts, attend)

  @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
  def step_layer(kind, is_long, params, cache, x, column, starts):
    length = cache[0].shape[2]
    slot = column % length
    # The newest column in each slot, including this step's; negative for empty slots.
    held = column - (slot - jnp.arange(length)) % length
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
      attended = flash_attention(
        query,
        keys,
        values,
        segment_ids=segment_ids,
        **score_options(config),
        **kernels.options,
      )
      return attended, kept

    return layer(kind, is_long, params, x, column[None, None], starts, attend)

  def prefill(weights, tokens, starts, columns, is_long=False):
    x = embed(weights.ends, tokens)
    cache = []
    for kind, params in zip(config.layer_kinds, weights.layers, strict=True):
      x, kept = prefill_layer(kind, is_long, params, x, starts, columns)
      cache.append(kept)
    return x[:, -1], cache

  def step(weights, cache, tokens, column, starts, is_long=False):
    x = embed(weights.ends, tokens[:, None])
    new_cache = []
    for kind, params, kept in zip(config.layer_kinds, weights.layers, cache, strict=True):
      x, kept = step_layer(kind, is_long, params, kept, x, column, starts)
      new_cache.append(kept)
    return x[:, -1], new_cache

  def last_logits(ends, hidden):
    norm = lambda x: final_norm(config, kernels)(x)  # noqa: E731
    return logits(config, ends, apply(norm, ends, hidden[:, None]))[:, 0]

  return Decoder(prefill, step, last_logits)


def cache_length(kind: LayerKind, columns: int) -> int:
  """Returns C, the number of columns in the cache of a layer, for a text of `columns` columns."""
  return columns if kind.window is None else min(columns, kind.window)


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
