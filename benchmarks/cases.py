"""The benchmarked operations at the shapes of real models.

Dimensions: B batch, T tokens, N query heads, K KV heads, H head dim, R rotated dimensions, D
features, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

import ll3m_kernels as kernels
from benchmarks import oracles, shapes
from benchmarks.oracles import Oracle

# The sizes for timing on an accelerator, for timing on a CPU, and for validating results.
SIZES = ("full", "cpu", "check")


class Argument(NamedTuple):
  """An array to draw at random.

  Attributes:
    shape: Shape of the array.
    dtype: Dtype of the array.
    spread: Standard deviation of floating-point numbers, or exclusive upper bound of integers.
  """

  shape: tuple[int, ...]
  dtype: Any
  spread: float = 1.0


class Case(NamedTuple):
  """One operation at one size.

  Attributes:
    function: Function (*arrays, implementation=...) -> an array or a tuple of arrays.
    oracle: Oracle of the function.
    arguments: Arrays of the function. Floating-point ones come first and have gradients.
    dims: Names and sizes of the dimensions that determine the work.
    tokens: Number of tokens, T times B.
    flops: FLOPs of a forward pass.
    backward: Ratio of the FLOPs of a backward pass to those of a forward pass.
    rate: Name in extra_info of the most informative rate.
    implementations: Implementations of the operation.
  """

  function: Callable[..., Any]
  oracle: Oracle
  arguments: tuple[Argument, ...]
  dims: Mapping[str, Any]
  tokens: int
  flops: float
  backward: float = 2.0
  rate: str = "flops_per_second"
  implementations: tuple[str, ...] = ("pallas", "xla")


def attention(model: str, size: str, dtype: Any, *, is_causal: bool = True) -> Case:
  """Returns self-attention of one sequence.

  FLOPs are 4 H per query head and visible pair of tokens. The backward pass counts 2.5 times as
  many, because it recomputes the scores (Dao, 2023).

  Args:
    model: Key of `shapes.ATTENTION`.
    size: One of `SIZES`. All but "full" reduce the window to a quarter of the length, and "check"
      has at most two KV heads.
    dtype: Dtype of the arrays.
    is_causal: Whether future keys are masked.
  """
  shape = shapes.ATTENTION[model]
  full_length = 4096 if shape.window is None else 4 * shape.window
  # At least two tiles of the kernel, which are twice as long in bfloat16.
  several_tiles = 640 if dtype == jnp.float32 else 1536
  length = {"full": full_length, "cpu": 512, "check": several_tiles}[size]
  window = None if shape.window is None else length // 4
  num_kv_heads = min(2, shape.num_kv_heads) if size == "check" else shape.num_kv_heads
  num_heads = num_kv_heads * shape.group
  local = None if window is None else (window - 1, 0)
  options = {"is_causal": is_causal, "logits_soft_cap": shape.soft_cap}
  pairs = sum(
    min(t + 1 if is_causal else length, window or length) for t in range(length)
  )  # windows are only measured with a causal mask
  return Case(
    function=functools.partial(kernels.flash_attention, local_window_size=local, **options),
    oracle=oracles.by_autodiff(functools.partial(oracles.attention, window=window, **options)),
    arguments=tuple(
      Argument((1, length, n, shape.head_dim), dtype)
      for n in (num_heads, num_kv_heads, num_kv_heads)
    ),
    dims={"T": length, "N": num_heads, "K": num_kv_heads, "H": shape.head_dim}
    | ({} if window is None else {"window": window}),
    tokens=length,
    flops=4.0 * num_heads * shape.head_dim * pairs,
    backward=2.5,
  )


def norm(model: str, size: str, dtype: Any, *, adds: bool = False) -> Case:
  """Returns a norm over [T, D], the model's RMSNorm or LayerNorm.

  FLOPs per element: 4 for a square, its sum and two products; 3 more for the mean, its subtraction
  and the bias of a LayerNorm; 1 for the residual addition.

  Args:
    model: Key of `shapes.NORMS`.
    size: One of `SIZES`.
    dtype: Dtype of the arrays.
    adds: Whether the residual is added first.
  """
  shape = shapes.NORMS[model]
  rows = {"full": 8192, "cpu": 2048, "check": 72}[size]
  is_centred = shape.kind == "layer"
  options = {"epsilon": 1e-5} | ({} if is_centred else {"scale_offset": shape.scale_offset})
  reference = functools.partial(oracles.norm, is_centred=is_centred, **options)
  if adds:
    reference = functools.partial(oracles.add_norm, reference, dtype)
  function = getattr(kernels, f"{'add_' if adds else ''}{shape.kind}_norm")
  x = Argument((rows, shape.features), dtype)
  weight = Argument((shape.features,), dtype)
  return Case(
    function=functools.partial(function, **options),
    oracle=oracles.by_autodiff(reference),
    arguments=(x,) * (1 + adds) + (weight,) * (1 + is_centred),
    dims={"T": rows, "D": shape.features},
    tokens=rows,
    flops=float(rows * shape.features * (4 + 3 * is_centred + adds)),
    rate="bytes_per_second",
  )


def rotary(model: str, size: str, dtype: Any) -> Case:
  """Returns the rotation of one sequence's queries and keys, at 3 FLOPs per rotated element.

  Args:
    model: Key of `shapes.ROTARY`.
    size: One of `SIZES`.
    dtype: Dtype of the arrays.
  """
  shape = shapes.ROTARY[model]
  length = {"full": 8192, "cpu": 1024, "check": 200}[size]
  heads = shape.num_heads, shape.num_kv_heads
  options = {"theta": 1e4, "rotary_dim": shape.rotary_dim}
  return Case(
    function=functools.partial(kernels.rotary_embedding, **options),
    oracle=oracles.by_autodiff(functools.partial(oracles.rotary, **options)),
    arguments=(
      *(Argument((1, length, n, shape.head_dim), dtype) for n in heads),
      Argument((1, length), jnp.int32, 8192),
    ),
    dims={"T": length, "N": heads[0], "K": heads[1], "H": shape.head_dim, "R": shape.rotary_dim},
    tokens=length,
    flops=3.0 * length * sum(heads) * shape.rotary_dim,
    backward=1.0,  # only the inverse rotation
    rate="bytes_per_second",
  )


def cross_entropy(model: str, size: str, dtype: Any) -> Case:
  """Returns the loss of a linear head: 2 D V FLOPs per token, and twice as many backward.

  There is no kernel: plain jnp is measured and validated on every platform.

  Args:
    model: Key of `shapes.HEADS`.
    size: One of `SIZES`. "cpu" has a quarter of D and an eighth of V, "check" a sixteenth of both.
    dtype: Dtype of the arrays.
  """
  shape = shapes.HEADS[model]
  length = {"full": 8192, "cpu": 256, "check": 72}[size]
  features = shape.features // {"full": 1, "cpu": 4, "check": 16}[size]
  vocabulary = shape.vocab_size // {"full": 1, "cpu": 8, "check": 16}[size]
  head = (features, vocabulary) if shape.layout == "dv" else (vocabulary, features)
  bias = (Argument((vocabulary,), dtype),) if shape.has_bias else ()

  def loss(hidden, head, *rest, implementation):
    *bias, labels = rest
    options = {"bias": bias[0]} if bias else {}
    return kernels.linear_cross_entropy(
      hidden, head, labels, head_layout=shape.layout, implementation=implementation, **options
    )[0]

  return Case(
    function=loss,
    oracle=oracles.cross_entropy(shape.layout),
    arguments=(
      Argument((length, features), dtype),
      Argument(head, dtype, features**-0.5),  # logits of about 1, like a model's
      *bias,
      Argument((length,), jnp.int32, vocabulary),
    ),
    dims={"T": length, "D": features, "V": vocabulary},
    tokens=length,
    flops=2.0 * length * features * vocabulary,
    implementations=("xla",),
  )
