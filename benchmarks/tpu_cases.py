"""Every kernel at the shapes of the real models, as functions to compile for a TPU.

Dimensions: B batch, T queries, S keys, N heads, K KV heads, H head dim, D features.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ll3m_kernels as kernels
from benchmarks import shapes

LENGTH = 4096
# The maximum length of Mistral, the longest preset; most presets allow less.
LONGEST = 32_768
# The kernel runs even where plain jnp would be chosen.
_KERNEL = {"implementation": "pallas"}
_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


class Case(NamedTuple):
  """One function to compile.

  Attributes:
    kernel: Name of the operation.
    name: Name of the model, and the particulars of the case.
    dtype: "bf16" or "f32".
    function: Function to trace with `arrays`: the forward pass, and the backward pass if any.
    arrays: Shapes and dtypes of its arguments.
    has_kernel: Whether the compiled module must contain a kernel.
  """

  kernel: str
  name: str
  dtype: str
  function: Callable[..., Any]
  arrays: tuple[jax.ShapeDtypeStruct, ...]
  has_kernel: bool = True


def all_cases() -> Iterator[Case]:
  """Yields the whole matrix: each preset in bfloat16, at several lengths, and some in float32."""
  for model, shape in shapes.every(shapes.attention_shapes).items():
    for length in (LENGTH, LONGEST):
      yield attention(model, shape, length, "bf16")
    yield packed_attention(model, shape, LENGTH, "bf16")
    yield decoding(model, shape, LONGEST, "bf16")
  for model, shape in shapes.every(shapes.norm_shapes).items():
    for rows in (1, LENGTH):
      yield norm(model, shape, rows, "bf16")
  for model, shape in shapes.every(shapes.rotary_shapes).items():
    for length in (1, LENGTH, LONGEST):
      yield rotary(model, shape, length, "bf16")
  for model in ("llama2_7b", "gemma_2b", "phi_2", "gemma3_4b"):  # [D, V], tied, bias, largest V
    yield head(model, shapes.HEADS[model], 2 * LENGTH, "bf16")
  for length, num_keys in ((200, 100), (2000, 1000), (1000, 2000)):
    yield cross_attention("phi_2", shapes.ATTENTION["phi_2"], length, num_keys, "bf16")
  yield attention("llama2_7b", shapes.ATTENTION["llama2_7b"], LENGTH, "f32")
  yield attention("gemma_2b", shapes.ATTENTION["gemma_2b"], 2048, "f32")
  yield norm("llama2_7b", shapes.NORMS["llama2_7b"], LENGTH, "f32")
  yield rotary("llama2_7b", shapes.ROTARY["llama2_7b"], LENGTH, "f32")


def slice_of_cases() -> Iterator[Case]:
  """Yields a few cases that together cover every kernel and every kind of shape."""
  attentions, norms, rotaries = shapes.ATTENTION, shapes.NORMS, shapes.ROTARY
  yield attention("mistral_7b", attentions["mistral_7b"], 16_384, "bf16")
  yield packed_attention("phi_2", attentions["phi_2"], 1000, "bf16")
  yield attention("gemma_2b", attentions["gemma_2b"], 1000, "f32")
  yield cross_attention("tiny_llama_1b", attentions["tiny_llama_1b"], 200, 100, "bf16")
  yield decoding("tiny_llama_1b", attentions["tiny_llama_1b"], LENGTH, "bf16")
  yield norm("open_llama_3b", norms["open_llama_3b"], 1000, "bf16")
  yield norm("phi_2", norms["phi_2"], LENGTH, "f32")
  yield rotary("phi_2", rotaries["phi_2"], 1000, "bf16")
  yield rotary("smollm2_135m", rotaries["smollm2_135m"], 1, "f32")


def attention(model: str, shape: shapes.AttentionShape, length: int, dtype: str) -> Case:
  """Returns attention as in training on one causal sequence per row."""
  options = {"is_causal": True, **_options(shape)}
  return Case(
    "flash_attention",
    f"{model} T={length}",
    dtype,
    with_gradients(functools.partial(kernels.flash_attention, **options), 3),
    _heads(shape, length, length, dtype),
  )


def packed_attention(model: str, shape: shapes.AttentionShape, length: int, dtype: str) -> Case:
  """Returns attention as in training on rows of several documents."""
  options = {"is_causal": True, **_options(shape)}

  def function(query, key, value, ids):
    return kernels.flash_attention(query, key, value, segment_ids=ids, **options)

  return Case(
    "flash_attention",
    f"{model} T={length} packed",
    dtype,
    with_gradients(function, 3),
    (*_heads(shape, length, length, dtype), jax.ShapeDtypeStruct((2, length), jnp.int32)),
  )


def cross_attention(
  model: str, shape: shapes.AttentionShape, length: int, num_keys: int, dtype: str
) -> Case:
  """Returns attention with the queries of one sequence and the keys of another."""
  return Case(
    "flash_attention",
    f"{model} T={length} S={num_keys}",
    dtype,
    with_gradients(functools.partial(kernels.flash_attention, **_KERNEL), 3),
    _heads(shape, length, num_keys, dtype),
  )


def decoding(model: str, shape: shapes.AttentionShape, length: int, dtype: str) -> Case:
  """Returns attention of one query per row to a cache; segment ids mark its valid slots."""

  options = _options(shape) | {"local_window_size": None}

  def function(query, key, value, query_ids, key_ids):
    return kernels.flash_attention(query, key, value, segment_ids=(query_ids, key_ids), **options)

  slots = min(length, shape.window or length)
  ids = tuple(jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (1, slots))
  return Case(
    "flash_attention",
    f"{model} T=1 S={slots}",
    dtype,
    function,
    (*_heads(shape, 1, slots, dtype), *ids),
  )


def norm(model: str, shape: shapes.NormShape, rows: int, dtype: str) -> Case:
  """Returns the norm, both alone and fused with the residual addition."""
  x = jax.ShapeDtypeStruct((2, rows, shape.features), _DTYPES[dtype])
  scale = jax.ShapeDtypeStruct((shape.features,), _DTYPES[dtype])
  if shape.kind == "layer":

    def function(x, residual, scale, bias):
      normed, total = kernels.add_layer_norm(x, residual, scale, bias, **_KERNEL)
      return kernels.layer_norm(normed, scale, bias, **_KERNEL) + total

    arrays = (x, x, scale, scale)
  else:
    options = {"scale_offset": shape.scale_offset, **_KERNEL}

    def function(x, residual, scale):
      normed, total = kernels.add_rms_norm(x, residual, scale, **options)
      return kernels.rms_norm(normed, scale, **options) + total

    arrays = (x, x, scale)
  return Case(
    f"{shape.kind}_norm",
    f"{model} T={rows}",
    dtype,
    with_gradients(function, len(arrays)),
    arrays,
  )


def rotary(model: str, shape: shapes.RotaryShape, length: int, dtype: str) -> Case:
  """Returns the rotation of queries and keys."""

  def function(query, key, positions):
    return kernels.rotary_embedding(query, key, positions, rotary_dim=shape.rotary_dim, **_KERNEL)

  query, key = (
    jax.ShapeDtypeStruct((2, length, n, shape.head_dim), _DTYPES[dtype])
    for n in (shape.num_heads, shape.num_kv_heads)
  )
  return Case(
    "rotary_embedding",
    f"{model} T={length}",
    dtype,
    with_gradients(function, 2),
    (query, key, jax.ShapeDtypeStruct((2, length), jnp.int32)),
  )


def head(model: str, shape: shapes.HeadShape, tokens: int, dtype: str) -> Case:
  """Returns the loss of a linear head, which is plain jnp on every platform."""
  size = {"d": shape.features, "v": shape.vocab_size}
  hidden = jax.ShapeDtypeStruct((tokens, shape.features), _DTYPES[dtype])
  weight = jax.ShapeDtypeStruct(tuple(size[axis] for axis in shape.layout), _DTYPES[dtype])
  bias = jax.ShapeDtypeStruct((shape.vocab_size,), _DTYPES[dtype])
  labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)

  def function(hidden, weight, *rest):
    bias, labels = rest if shape.has_bias else (None, *rest)
    return kernels.linear_cross_entropy(
      hidden, weight, labels, head_layout=shape.layout, bias=bias, z_loss=1e-4
    )

  arrays = (hidden, weight, bias) if shape.has_bias else (hidden, weight)
  return Case(
    "linear_cross_entropy",
    f"{model} {tokens} tokens",
    dtype,
    with_gradients(function, len(arrays)),
    (*arrays, labels),
    has_kernel=False,
  )


def _options(shape: shapes.AttentionShape) -> dict[str, Any]:
  window = None if shape.window is None else (shape.window - 1, 0)
  return {"local_window_size": window, "logits_soft_cap": shape.soft_cap, **_KERNEL}


def _heads(shape: shapes.AttentionShape, length: int, num_keys: int, dtype: str) -> tuple:
  sizes = (
    (length, shape.num_heads),
    (num_keys, shape.num_kv_heads),
    (num_keys, shape.num_kv_heads),
  )
  return tuple(jax.ShapeDtypeStruct((2, t, n, shape.head_dim), _DTYPES[dtype]) for t, n in sizes)


def with_gradients(function: Callable[..., Any], count: int) -> Callable[..., Any]:
  """Makes a function also return the gradients of its first `count` arguments.

  The cotangents of its results are 1.
  """

  def both(*arrays):
    results, vjp = jax.vjp(lambda *x: function(*x, *arrays[count:]), *arrays[:count])
    return results, vjp(jax.tree.map(jnp.ones_like, results))

  return both
