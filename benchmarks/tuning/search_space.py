"""The search space: the limits of each operation, the values to try, and the kernels to price.

Dimensions: T tokens, H head dim, D features.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ll3m_kernels import block_tables, dispatch
from ll3m_kernels.attention import backward as attention_backward
from ll3m_kernels.attention import block_sizes as attention_blocks
from ll3m_kernels.attention import forward as attention_forward
from ll3m_kernels.attention import spec as attention_spec
from ll3m_kernels.dispatch import MIB, Generation
from ll3m_kernels.norms import backward as norm_backward
from ll3m_kernels.norms import block_sizes as norm_blocks
from ll3m_kernels.norms import forward as norm_forward
from ll3m_kernels.norms.spec import Spec as NormSpec

DTYPES = {"bfloat16": 2, "float32": 4}
_MASKS = ("causal", "full", "window")


class Shape(NamedTuple):
  """A shape to tune for.

  Attributes:
    size: Head dim H, or features D.
    length: Number of tokens, T.
    mask: Mask of attention; a window is a quarter of the length.
    dtype: "bfloat16" or "float32".
  """

  size: int
  length: int
  mask: str = ""
  dtype: str = "bfloat16"


class Operation(NamedTuple):
  """An operation with limits.

  Attributes:
    key: Key of a shape in the tables.
    rule: Limits of a shape without an entry in the tables.
    options: Values to try for each limit, for each kernel that is priced separately.
    serves: Whether limits are valid for a shape.
    shapes: Shapes that are tuned by default.
    masks: Masks that the operation supports.
  """

  key: Callable[[Shape, Generation], block_tables.Key]
  rule: Callable[[Shape, Generation], Any]
  options: Mapping[str, Mapping[str, tuple[int, ...]]]
  serves: Callable[[Any, Shape, Generation], bool]
  shapes: tuple[Shape, ...]
  masks: tuple[str, ...] = ("",)


def build(
  operation: str, kernel: str, shape: list[Any], limits: dict[str, int]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Returns a kernel with the given limits, and its arrays; see `estimates.estimate`.

  Args:
    operation: Key of `OPERATIONS`.
    kernel: Key of the operation's `options`.
    shape: Fields of a `Shape`.
    limits: Limits by name.
  """
  shape = Shape(*shape)
  name = OPERATIONS[operation].key(shape, dispatch.generation()).operation
  function, arrays = _BUILDERS[kernel](shape)

  def limited(*arrays):
    with block_tables.force({name: limits}):
      return function(*arrays)

  return limited, arrays


def _problem(shape: Shape) -> attention_blocks.Problem:
  length, size = shape.length, shape.size
  itemsize = DTYPES[shape.dtype]
  return attention_blocks.Problem(length, length, size, size, itemsize, False, shape.mask)


def _spec(shape: Shape) -> attention_spec.Spec:
  window = (shape.length // 4 - 1, 0) if shape.mask == "window" else None
  span = attention_spec.make_span(shape.mask != "full", window)
  return attention_spec.Spec(shape.size**-0.5, span, None)


def _attention_arrays(shape: Shape) -> tuple[Any, Any, Any]:
  """Describes queries, keys and the queries' row statistics, with 8 query and 2 KV heads.

  With a single head, nothing is computed while its first blocks are fetched, which would penalise
  large blocks. A chip may also have two cores.
  """

  def heads(count):
    return jax.ShapeDtypeStruct((1, shape.length, count, shape.size), jnp.dtype(shape.dtype))

  return heads(8), heads(2), jax.ShapeDtypeStruct((1, 8, shape.length), jnp.float32)


def _attention_forward(shape: Shape):
  query, key, _ = _attention_arrays(shape)
  function = functools.partial(attention_forward.forward, _spec(shape), None)
  return (lambda *arrays: function(*arrays, None, None)), (query, key, key)


def _attention_backward(shape: Shape):
  query, key, rows = _attention_arrays(shape)
  function = functools.partial(attention_backward.backward, _spec(shape), None)
  return (
    lambda q, k, v, *rest: function(q, k, v, None, None, *rest),
    (query, key, key, query, rows, query, rows),
  )


def _norm_rows(shape: Shape) -> tuple[Any, Any]:
  dtype = jnp.dtype(shape.dtype)
  x = jax.ShapeDtypeStruct((shape.length, shape.size), dtype)
  return x, jax.ShapeDtypeStruct((shape.size,), dtype)


def _norm_forward(shape: Shape):
  x, weight = _norm_rows(shape)
  spec = NormSpec(is_centred=False, epsilon=1e-6, scale_offset=0.0)
  return (lambda x, scale: norm_forward.forward(spec, x, scale, None)), (x, weight)


def _norm_backward(shape: Shape):
  x, weight = _norm_rows(shape)
  spec = NormSpec(is_centred=False, epsilon=1e-6, scale_offset=0.0)
  return (lambda x, scale, bar: norm_backward.backward(spec, x, scale, None, bar, None)), (
    x,
    weight,
    x,
  )


def _norm_problem(kernel: str, shape: Shape) -> norm_blocks.Problem:
  backward = kernel == "norm_backward"
  itemsize = DTYPES[shape.dtype]
  return norm_blocks.Problem(shape.length, shape.size, itemsize, 2 + backward, 1, backward)


def _norm(kernel: str) -> Operation:
  return Operation(
    key=lambda shape, generation: norm_blocks.key_of(_norm_problem(kernel, shape), generation),
    rule=lambda shape, generation: norm_blocks.RULE,
    options={
      kernel: {
        "block_bytes": (MIB // 2, MIB, 2 * MIB, 4 * MIB),
        "tile": (2**15, 2**16, 2**17, 2**18, 2**19),
      }
    },
    serves=lambda limits, shape, generation: True,  # limits that are too large are reduced
    shapes=tuple(Shape(size, 8192) for size in (2048, 2560, 3072, 4096, 5120, 8192)),
  )


OPERATIONS = {
  "flash_attention": Operation(
    key=lambda shape, generation: attention_blocks.key_of(_problem(shape), generation),
    rule=lambda shape, generation: attention_blocks.rule(_problem(shape), generation),
    options={
      "attention_forward": {
        "block_kv_compute": (256, 512, 1024, 2048),
        "block_q": (512, 1024, 2048, 4096),
      },
      "attention_backward": {
        "block_kv_compute_backward": (256, 512, 1024, 2048),
        "block_q_backward": (512, 1024, 2048, 4096),
      },
    },
    serves=lambda limits, shape, generation: attention_blocks.serves(
      limits, _problem(shape), generation
    ),
    shapes=tuple(
      Shape(size, length, "causal") for size in (64, 80, 100, 128, 256) for length in (4096, 2048)
    ),
    masks=_MASKS,
  ),
  "norm_forward": _norm("norm_forward"),
  "norm_backward": _norm("norm_backward"),
}
_BUILDERS = {
  "attention_forward": _attention_forward,
  "attention_backward": _attention_backward,
  "norm_forward": _norm_forward,
  "norm_backward": _norm_backward,
}
