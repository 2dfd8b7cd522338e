"""Pallas kernels run by NumPy: nothing is compiled, and memory is checked strictly.

A test runs a kernel once, and the kernel may have a thousand operations: lowering and compiling
them for XLA took 317 s of the 431 s of test_flash_attention. NumPy runs a kernel of attention in
0.2 s, after jax has traced it in 0.3 s.

As in jax's interpreter for TPUs, memory outside of arrays is full of NaN, and so is memory that
nothing has been written to: scratch memory, and each output block when the grid comes to it.
Here, an index out of bounds and a false `pl.multiple_of` are errors.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core

Array = np.ndarray


# Interpreting for a TPU does not happen here, but it is part of the key of jax's trace caches: what
# was traced with NumPy's kernels is not used outside, and the other way around.
_KEY = pltpu.InterpretParams(random_seed=2**20)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Has NumPy run the kernels that are called inside of this context, jitted or not."""
  changed = functools.partial(_pallas_call, pl.pallas_call)
  with pltpu.force_tpu_interpret_mode(_KEY), mock.patch.object(pl, "pallas_call", changed):
    yield


def _pallas_call(original: Callable, *args: Any, **kwargs: Any) -> Callable:
  call = original(*args, **kwargs)

  def wrapped(*operands):
    closed, shapes = jax.make_jaxpr(call, return_shape=True)(*operands)
    (equation,) = closed.eqns

    def run(*arrays):
      with np.errstate(all="ignore"):
        outputs = _run_grid([np.array(array) for array in arrays], **equation.params)
      return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return jax.pure_callback(run, shapes, *operands)

  return wrapped


def _run_grid(inputs, *, jaxpr, grid_mapping, input_output_aliases, **_) -> list[Array]:
  """Runs a kernel for every index of its grid."""
  assert not grid_mapping.num_index_operands and not grid_mapping.num_dynamic_grid_bounds
  aliases = {output: inputs[number] for number, output in input_output_aliases}
  outputs = [
    aliases.get(number, _uninitialised(mapping.array_aval))
    for number, mapping in enumerate(grid_mapping.block_mappings_output)
  ]
  mappings = grid_mapping.block_mappings
  blocks = [_Block(m, array) for m, array in zip(mappings, [*inputs, *outputs], strict=True)]
  scratch = [_uninitialised(variable.aval) for variable in jaxpr.invars[len(mappings) :]]
  written = blocks[len(inputs) :]
  for indices in np.ndindex(*grid_mapping.grid):
    grid = list(zip(indices, grid_mapping.grid, strict=True))
    places = [block.place(indices) for block in blocks]
    for block, place in zip(written, places[len(inputs) :], strict=True):
      if block.is_at not in (None, place):
        block.store()
    for number, (block, place) in enumerate(zip(blocks, places, strict=True)):
      if block.is_at != place:
        block.move(place, is_read=number < len(inputs))
    _evaluate(jaxpr, [*(block.seen for block in blocks), *scratch], grid)
  for block in written:
    block.store()
  return outputs


class _Block:
  """The block of an array that is in a core's memory."""

  def __init__(self, mapping: Any, array: Array):
    sizes = [
      1 if isinstance(size, pl.Squeezed) else size.block_size for size in mapping.block_shape
    ]
    self._mapping, self._array, self._sizes = mapping, array, sizes
    self.is_at = None

  def place(self, indices: Sequence[int]) -> tuple[int, ...]:
    """Returns the first index of the block, for an index of the grid."""
    index = _evaluate(self._mapping.index_map_jaxpr, map(np.int32, indices), ())
    return tuple(int(i) * size for i, size in zip(index, self._sizes, strict=True))

  def move(self, place: tuple[int, ...], is_read: bool) -> None:
    self.is_at = place
    self._block = _uninitialised(self._mapping.array_aval.update(shape=tuple(self._sizes)))
    is_squeezed = [isinstance(size, pl.Squeezed) for size in self._mapping.block_shape]
    self.seen = self._block.squeeze(tuple(np.flatnonzero(is_squeezed)))
    if is_read:
      inside, outside = self._inside()
      self._block[inside] = self._array[outside]

  def store(self) -> None:
    inside, outside = self._inside()
    self._array[outside] = self._block[inside]

  def _inside(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Returns where in the block, and where in the array, their common elements are."""
    both = list(zip(self.is_at, self._sizes, self._array.shape, strict=True))
    assert all(0 <= start < length for start, _, length in both), (self.is_at, self._array.shape)
    sizes = [min(size, length - start) for start, size, length in both]
    return tuple(map(slice, sizes)), tuple(
      map(slice, self.is_at, map(operator.add, self.is_at, sizes))
    )


def _uninitialised(aval: Any) -> Array:
  if jnp.issubdtype(aval.dtype, jnp.floating):
    return np.full(aval.shape, np.nan, aval.dtype)
  return np.full(aval.shape, np.iinfo(aval.dtype).min, aval.dtype)


def _evaluate(jaxpr: Any, arguments: Iterable[Any], grid: Sequence[tuple[int, int]]) -> list[Any]:
  """Evaluates a jaxpr; its references are arrays, which it changes.

  Args:
    jaxpr: The jaxpr of a kernel or of a part of one.
    arguments: Values and references.
    grid: The index and the size along each axis of the grid.
  """
  values = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
  values |= zip(jaxpr.invars, arguments, strict=True)

  def read(atom):
    return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    arguments = list(map(read, equation.invars))
    if name in _ELEMENTWISE:
      found = [_ELEMENTWISE[name](*arguments)]
    elif name in _CONTROL:
      found = _CONTROL[name](*arguments, grid=grid, **params)
    else:
      found = [_OTHER[name](*arguments, **params)]
    for variable, value in zip(equation.outvars, found, strict=True):
      value = np.asarray(value)
      assert (value.shape, value.dtype) == (variable.aval.shape, variable.aval.dtype), equation
      values[variable] = value
  return list(map(read, jaxpr.outvars))


def _cond(index, *arguments, branches, grid, **_):
  return _evaluate(branches[np.clip(int(index), 0, len(branches) - 1)], arguments, grid)


def _while(*arguments, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr, grid):
  of_cond, arguments = arguments[:cond_nconsts], arguments[cond_nconsts:]
  of_body, carried = arguments[:body_nconsts], arguments[body_nconsts:]
  while _evaluate(cond_jaxpr, [*of_cond, *carried], grid)[0]:
    carried = _evaluate(body_jaxpr, [*of_body, *carried], grid)
  return carried


def _scan(*arguments, jaxpr, length, grid, **_):
  count = len(arguments) - len(jaxpr.outvars)  # `fori_loop` has neither inputs nor outputs per step
  constants, carried = arguments[:count], arguments[count:]
  for _ in range(length):
    carried = _evaluate(jaxpr, [*constants, *carried], grid)
  return carried


def _get(ref, *leaves, tree):
  return _part(ref, tree, leaves).copy()


def _swap(ref, value, *leaves, tree):
  part = _part(ref, tree, leaves)
  old = part.copy()
  part[...] = value
  return old


def _part(ref, tree, leaves) -> Array:
  """Returns the part of a reference that an index selects; changes to it are seen."""
  for indexer in jax.tree.unflatten(tree, leaves):
    index = []
    for place, length in zip(indexer.indices, ref.shape, strict=True):
      is_slice = isinstance(place, pl.Slice)
      start, size = int(place.start if is_slice else place), place.size if is_slice else 1
      assert 0 <= start <= start + size <= length and getattr(place, "stride", 1) == 1, indexer
      index.append(slice(start, start + size) if is_slice else start)
    ref = ref[*index, ...]
  return ref


def _div(x, y):
  if jnp.issubdtype(x.dtype, jnp.floating):
    return np.divide(x, y)
  return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))  # rounds towards 0


def _dot_general(a, b, *, dimension_numbers, preferred_element_type, **_):
  (of_a, of_b), batch = dimension_numbers
  assert not any(batch)
  dtype = np.result_type(preferred_element_type, np.float32)
  a, b = a.astype(dtype), b.astype(dtype)
  return np.tensordot(a, b, (of_a, of_b)).astype(preferred_element_type)


def _broadcast_in_dim(x, *, shape, broadcast_dimensions, **_):
  sizes = np.ones(len(shape), int)
  sizes[list(broadcast_dimensions)] = x.shape
  return np.broadcast_to(x.reshape(sizes), shape)


def _iota(*, dtype, shape, dimension, **_):
  numbers = np.arange(shape[dimension], dtype=dtype)
  return np.broadcast_to(
    np.expand_dims(numbers, [d for d in range(len(shape)) if d != dimension]), shape
  )


def _multiple_of(x, *, values):
  assert (x % values[0] == 0).all(), (x, values)
  return x


def _slice(x, *, start_indices, limit_indices, strides):
  return x[tuple(map(slice, start_indices, limit_indices, strides or [None] * x.ndim))]


_ELEMENTWISE = {
  "abs": np.abs,
  "add": np.add,
  "and": np.bitwise_and,
  "div": _div,
  "eq": np.equal,
  "exp": np.exp,
  "exp2": np.exp2,
  "ge": np.greater_equal,
  "gt": np.greater,
  "le": np.less_equal,
  "log": np.log,
  "lt": np.less,
  "max": np.maximum,
  "min": np.minimum,
  "mul": np.multiply,
  "ne": np.not_equal,
  "neg": np.negative,
  "not": np.invert,
  "or": np.bitwise_or,
  "rem": np.fmod,
  "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
  "select_n": lambda which, *cases: np.where(which, *reversed(cases)),
  "sub": np.subtract,
  "tanh": np.tanh,
}
_CONTROL = {
  "cond": _cond,
  "jit": lambda *arguments, jaxpr, grid, **_: _evaluate(jaxpr, arguments, grid),
  "program_id": lambda *, axis, grid: [np.int32(grid[axis][0])],
  "scan": _scan,
  "while": _while,
}
_OTHER = {
  "broadcast_in_dim": _broadcast_in_dim,
  "concatenate": lambda *arrays, dimension: np.concatenate(arrays, dimension),
  "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
  "dot_general": _dot_general,
  "get": _get,
  "iota": _iota,
  "multiple_of": _multiple_of,
  "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
  "reduce_max": lambda x, *, axes, **_: x.max(axes),
  "reduce_sum": lambda x, *, axes, **_: x.sum(axes),
  "slice": _slice,
  "swap": _swap,
  "transpose": lambda x, *, permutation: x.transpose(permutation),
}
