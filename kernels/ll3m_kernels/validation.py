"""Checks of arguments that the operations share: a `ValueError` says what was expected and given.

Options change what is compiled, so they are Python's or NumPy's numbers: no arrays, and no tracers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_INT32 = np.iinfo(np.int32)
# Of float32, without subnormal numbers.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_array(name: str, x: Any) -> None:
  """Demands something with a shape and a dtype: an array of jax or NumPy, or a description of one.

  Raises:
    ValueError: it is something else, such as a list.
  """
  if not isinstance(getattr(x, "shape", None), tuple) or not _is_dtype(getattr(x, "dtype", None)):
    raise ValueError(f"{name} must be an array, got {type(x).__name__}")


def floating(name: str, x: Any) -> Float[Array, "..."] | jax.ShapeDtypeStruct:
  """Demands an array of floating-point numbers, and returns it as one of jax's.

  Args:
    name: what to call it in the message.
    x: an array; what only describes one comes back as a `jax.ShapeDtypeStruct`. NumPy's float64
      becomes float32, as everywhere in jax without `jax_enable_x64`.

  Raises:
    ValueError: it is no array, or holds something else.
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
  """Demands an array of integers, of any width.

  Raises:
    ValueError: it is no array, or holds something else.
  """
  check_array(name, x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers, got {x.dtype}")


def int32_ids(name: str, ids: Any) -> Int[Array, "..."] | jax.ShapeDtypeStruct:
  """Demands integers that fit in int32, such as segment ids or positions, and returns them as that.

  Args:
    name: what to call them in the message.
    ids: an array of integers of any width; what only describes one comes back as a description.
      Values are looked at where they are wider than int32 and at hand. Those of a traced array are
      not: there, uint32 and 64-bit integers (which need `jax_enable_x64`) are taken modulo 2**32,
      so that ids that differ by a multiple of it are one.

  Raises:
    ValueError: it is no array, holds something else, or a value that is too large or too small.
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
  """Demands a finite number that float32 can hold, and returns it as a Python float.

  Args:
    name: what to call it in the message.
    value: an int or a float, of Python or NumPy.
    at_least: the smallest one that is allowed.
    above: what it has to exceed, in float32 without subnormal numbers, which TPUs take for 0.

  Raises:
    ValueError: it is something else, not finite, or out of range.
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
  """Demands an integer, and returns it as a Python int.

  Args:
    name: what to call it in the message.
    value: an int, of Python or NumPy.
    at_least: the smallest one that is allowed.

  Raises:
    ValueError: it is something else, a float or a bool for instance, or too small.
  """
  expected = "a whole number" + ("" if at_least is None else f" of at least {at_least}")
  if not isinstance(value, int | np.integer) or isinstance(value, bool):
    raise ValueError(f"{name} must be {expected}, got {_said(value)}")
  if at_least is not None and value < at_least:
    raise ValueError(f"{name} must be {expected}, got {value}")
  return int(value)


def flag(name: str, value: Any) -> bool:
  """Demands True or False, and returns it as a Python bool.

  Raises:
    ValueError: it is something else, 1 or an array for instance.
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
  """Shows a value of a wrong type, arrays and tracers in short."""
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"an array of shape {value.shape} and {value.dtype}"
  return repr(value)
