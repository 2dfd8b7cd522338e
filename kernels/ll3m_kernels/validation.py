"""Argument checks shared by the operations; errors say what was expected and what was given.

Options change what is compiled, so they must be Python or NumPy numbers, not arrays or tracers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_INT32 = np.iinfo(np.int32)
# The range of float32 without subnormal numbers.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_array(name: str, x: Any) -> None:
  """Checks that an argument has a shape and a dtype, as jax and NumPy arrays do.

  A description of an array, such as `jax.ShapeDtypeStruct`, is accepted too.

  Raises:
    ValueError: The argument is something else, such as a list.
  """
  if not isinstance(getattr(x, "shape", None), tuple) or not _is_dtype(getattr(x, "dtype", None)):
    raise ValueError(f"{name} must be an array, got {type(x).__name__}")


def floating(name: str, x: Any) -> Float[Array, "..."] | jax.ShapeDtypeStruct:
  """Checks that an argument is an array of floating-point numbers and returns it as a jax array.

  Args:
    name: Name of the argument in error messages.
    x: Array. The description of an array is returned as a `jax.ShapeDtypeStruct`. NumPy's float64
      becomes float32, as everywhere in jax without `jax_enable_x64`.

  Raises:
    ValueError: The argument is not an array, or its dtype is not floating-point.
  """
  check_array(name, x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"{name} must be floating, got {x.dtype}")
  if isinstance(x, jax.Array):
    return x
  if isinstance(x, np.ndarray | np.generic):
    return jnp.asarray(x)
  return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def integers(name: str, x: Any) -> None:
  """Checks that an argument is an array of integers, of any width.

  Raises:
    ValueError: The argument is not an array, or its dtype is not an integer.
  """
  check_array(name, x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {x.dtype}")


def int32_ids(name: str, ids: Any) -> Int[Array, "..."] | jax.ShapeDtypeStruct:
  """Checks that integers fit in int32, such as segment ids or positions, and returns them as int32.

  Args:
    name: Name of the argument in error messages.
    ids: Array of integers of any width. The description of an array is returned as a description.
      Values wider than int32 are checked if they are known. In a traced array they are not: uint32
      and 64-bit integers (which need `jax_enable_x64`) are then taken modulo 2**32, so ids that
      differ by a multiple of 2**32 become equal.

  Raises:
    ValueError: The argument is not an array of integers, or a value does not fit in int32.
  """
  integers(name, ids)
  if not isinstance(ids, jax.Array | np.ndarray | np.generic):
    return jax.ShapeDtypeStruct(ids.shape, jnp.int32)
  is_wide = not np.can_cast(ids.dtype, np.int32)
  if is_wide and 0 not in ids.shape and _is_at_hand(ids):
    values = np.asarray(ids)
    for value in (int(values.min()), int(values.max())):
      if not _INT32.min <= value <= _INT32.max:
        raise ValueError(f"{name} must fit in int32, got {value}")
  return jnp.asarray(ids.astype(jnp.int32))


def finite_number(
  name: str, value: Any, *, at_least: int | float | None = None, above: int | float | None = None
) -> float:
  """Checks that a number is finite and in float32's range, and returns it as a Python float.

  Args:
    name: Name of the argument in error messages.
    value: Python or NumPy int or float.
    at_least: Smallest allowed value.
    above: Exclusive lower bound. The value must exceed it by a normal float32 number, since TPUs
      flush subnormal numbers to 0.

  Raises:
    ValueError: The value is not a number, is not finite, or is out of range.
  """
  expected = "a finite number" if above != 0 else "a positive number"
  if at_least is not None:
    expected += f" of at least {at_least:g}"
  if above:
    expected += f" above {above:g}"
  is_number = isinstance(value, int | float | np.integer | np.floating)
  if not is_number or isinstance(value, bool):
    raise ValueError(f"{name} must be {expected}, got {_said(value)}")
  try:
    number = float(value)
  except OverflowError:
    number = math.inf
  fits = abs(number) <= _MOST  # not so for nan
  if fits and above is not None:
    fits = number - above >= _LEAST
  if not fits or (at_least is not None and number < at_least):
    raise ValueError(f"{name} must be {expected}, got {value}")
  return number


def whole_number(name: str, value: Any, *, at_least: int | None = None) -> int:
  """Checks that a value is an integer and returns it as a Python int.

  Args:
    name: Name of the argument in error messages.
    value: Python or NumPy int.
    at_least: Smallest allowed value.

  Raises:
    ValueError: The value is not an integer (a float or a bool, for instance), or is too small.
  """
  expected = "a whole number" + ("" if at_least is None else f" of at least {at_least}")
  if not isinstance(value, int | np.integer) or isinstance(value, bool):
    raise ValueError(f"{name} must be {expected}, got {_said(value)}")
  if at_least is not None and value < at_least:
    raise ValueError(f"{name} must be {expected}, got {value}")
  return int(value)


def flag(name: str, value: Any) -> bool:
  """Checks that a value is True or False and returns it as a Python bool.

  Raises:
    ValueError: The value is not a bool (1 or an array, for instance).
  """
  if not isinstance(value, bool | np.bool_):
    raise ValueError(f"{name} must be True or False, got {_said(value)}")
  return bool(value)


def _is_dtype(dtype: Any) -> bool:
  return isinstance(dtype, np.dtype) or jnp.issubdtype(dtype, jax.dtypes.extended)


def _is_at_hand(x: Any) -> bool:
  if not isinstance(x, jax.Array):
    return True
  return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable


def _said(value: Any) -> str:
  """Formats a value of the wrong type; arrays and tracers by shape and dtype only."""
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"an array of shape {value.shape} and {value.dtype}"
  return repr(value)
