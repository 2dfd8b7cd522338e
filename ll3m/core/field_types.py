"""Types of the fields of `ModelConfig`, and conversion of values from JSON and command lines."""

import typing
from typing import Any


def convert(name: str, value: Any, expected: Any) -> Any:
  """Turns 10000 into 10000.0 for a float, and JSON's lists into tuples.

  Raises:
    ValueError: The number is too large for a float.
  """
  if typing.get_origin(expected) is tuple and isinstance(value, list | tuple):
    return tuple(convert(name, item, typing.get_args(expected)[0]) for item in value)
  if type(value) is not int or expected not in (float, float | None):
    return value
  try:
    return float(value)
  except OverflowError:
    raise ValueError(f"{name} must be finite, got a number of {len(hex(value)) * 4} bits") from None


def has_type(value: Any, expected: Any) -> bool:
  """Returns whether a value has a type, or can be converted to it."""
  if typing.get_origin(expected) is tuple:
    item = typing.get_args(expected)[0]
    return isinstance(value, list | tuple) and all(has_type(x, item) for x in value)
  if expected is bool or expected is str:
    return isinstance(value, expected)
  if isinstance(value, bool):
    return False
  # JSON files and users write 10000 for a float.
  return isinstance(value, expected) or (expected in (float, float | None) and type(value) is int)


def type_name(expected: Any) -> str:
  """Returns the name of a type for messages."""
  if typing.get_origin(expected) is tuple:
    return f"a list of {type_name(typing.get_args(expected)[0])}"
  return getattr(expected, "__name__", str(expected))
