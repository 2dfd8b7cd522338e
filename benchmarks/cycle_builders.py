"""Builders of the functions to price: our kernels, their peers, and plain copies.

Each builder returns a function and the shapes of its arrays, which are all bfloat16. Builders are
called in the process that compiles the functions (see `tuning.estimates`).

Dimensions: B batch, T tokens, N query heads, K KV heads, H head dim, D features.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import ll3m_kernels as kernels
from benchmarks import tpu_cases
from ll3m_kernels.block_arithmetic import LANES, up
from ll3m_kernels.dispatch import MIB


def attention(
  implementation: str,
  *,
  tokens: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  is_causal: bool,
  window: int | None = None,
  soft_cap: float | None = None,
  backward: bool = False,
  block: int = 0,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Returns self-attention of one sequence.

  Args:
    implementation: "ours", "xla" (jax.nn), "jax" (jax.experimental's flash_attention), "splash" or
      "tokamax".
    tokens: Number of tokens, T.
    heads: Number of query heads, N.
    kv_heads: Number of KV heads, K.
    head_dim: Head dim, H; rounded up to a multiple of 128 for peers that require one.
    is_causal: Whether future keys are masked.
    window: Number of keys that a query sees, for our kernels; the priced peers have no windows.
    soft_cap: Soft cap of the scores, for our kernels.
    backward: Whether to include the gradients of query, key and value.
    block: Size of all blocks, for the peers whose blocks can be chosen.
  """
  query, key = (
    jax.ShapeDtypeStruct((1, tokens, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads)
  )
  if implementation == "ours":
    function = functools.partial(
      kernels.flash_attention,
      is_causal=is_causal,
      local_window_size=None if window is None else (window - 1, 0),
      logits_soft_cap=soft_cap,
      implementation="pallas",
    )
  elif implementation == "xla":
    function = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
  elif implementation == "tokamax":
    import tokamax  # not one of our requirements

    function = functools.partial(
      tokamax.dot_product_attention, is_causal=is_causal, implementation="mosaic_tpu"
    )
  else:
    # These peers take heads first, and their heads cannot share keys.
    width = up(head_dim, LANES)
    query = key = jax.ShapeDtypeStruct((1, heads, tokens, width), jnp.bfloat16)
    function = {"jax": _jax_attention, "splash": _splash_attention}[implementation](
      tokens, heads, is_causal, block
    )
  if not backward:
    return function, (query, key, key)
  return tpu_cases.with_gradients(function, 3), (query, key, key)


def _jax_attention(tokens, heads, is_causal, block):
  from jax.experimental.pallas.ops.tpu import flash_attention as peer

  sizes = peer.BlockSizes(block, block, block, 1, *(block,) * 7)
  return functools.partial(
    peer.flash_attention, causal=is_causal, sm_scale=LANES**-0.5, block_sizes=sizes
  )


def _splash_attention(tokens, heads, is_causal, block):
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as peer,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mask = (masks.CausalMask if is_causal else masks.FullMask)((tokens, tokens))
  sizes = peer.BlockSizes(block, block, block, block, block, block, block, block)
  return jax.vmap(
    peer.make_splash_mha(
      masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
  )


def norm(
  implementation: str,
  *,
  operation: str,
  rows: int,
  features: int,
  backward: bool = False,
  block: int = 0,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Returns a norm of [T, D] rows, or a copy of the bytes that it reads and writes.

  Args:
    implementation: "ours" or "copy".
    operation: "rms_norm", "layer_norm", "add_rms_norm" or "add_layer_norm".
    rows: Number of rows, T.
    features: Number of features, D.
    backward: Whether to include the gradients of all arguments.
    block: Bytes of a block of the copy.
  """
  x = jax.ShapeDtypeStruct((rows, features), jnp.bfloat16)
  weight = jax.ShapeDtypeStruct((features,), jnp.bfloat16)
  adds, is_centred = operation.startswith("add_"), operation.endswith("layer_norm")
  if implementation == "copy":
    reads, writes = norm_traffic(operation, backward)
    return _copy(reads, writes, max(block // (features * 2), 16)), (x,) * reads
  function = functools.partial(getattr(kernels, operation), implementation="pallas")
  arrays = (x,) * (1 + adds) + (weight,) * (1 + is_centred)
  return (tpu_cases.with_gradients(function, len(arrays)) if backward else function), arrays


def norm_traffic(operation: str, backward: bool) -> tuple[int, int]:
  """Returns how many arrays [T, D] a pass must read and write."""
  adds = operation.startswith("add_")
  if backward:
    # It reads the norm's input and the cotangent of each result. It writes one gradient, which x
    # and the residual share.
    return 2 + adds, 1
  return 1 + adds, 1 + adds


def rotary(
  implementation: str, *, tokens: int, heads: int, kv_heads: int, head_dim: int, block: int = 0
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Returns the rotation of one sequence's queries and keys, or a copy of their bytes.

  Args:
    implementation: "ours" or "copy".
    tokens: Number of tokens, T.
    heads: Number of query heads, N.
    kv_heads: Number of KV heads, K.
    head_dim: Head dim, H.
    block: Bytes of a block of the copy.
  """
  if implementation == "copy":
    width = (heads + kv_heads) * head_dim
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    return _copy(1, 1, max(block // (width * 2), 16)), (x,)
  query, key = (
    jax.ShapeDtypeStruct((1, tokens, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads)
  )
  positions = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
  function = functools.partial(kernels.rotary_embedding, implementation="pallas")
  return function, (query, key, positions)


def _copy(reads: int, writes: int, rows: int) -> Callable[..., Any]:
  """Returns a kernel that only reads `reads` arrays and writes `writes` arrays."""

  def kernel(*refs):
    for i, out in enumerate(refs[reads:]):
      out[...] = refs[i][...]

  def function(*arrays):
    size = min(rows // 16 * 16, arrays[0].shape[0])
    spec = pl.BlockSpec((size, arrays[0].shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
      kernel,
      grid=(pl.cdiv(arrays[0].shape[0], size),),
      in_specs=[spec] * reads,
      out_specs=[spec] * writes,
      out_shape=[arrays[0]] * writes,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",), vmem_limit_bytes=60 * MIB
      ),
      name="copy",
    )(*arrays)

  return function
