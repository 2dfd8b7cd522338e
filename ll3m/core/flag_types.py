"""Typed absl flags for the options of a dataclass."""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any, override

import absl.flags

from ll3m.core.flag_help import optional_base
from ll3m.core.options import CHOICES, HELP, REPEATED

_MODULE = "flags"  # absl wants a name for where a flag is defined


class TupleParser(absl.flags.ArgumentParser):
  """Parses a tuple written as a Python literal: "('targets', )" or "(2048,)"."""

  syntactic_help = "a Python tuple, e.g. (2048,)"

  def __init__(self, item_type: type):
    super().__init__()
    self._item_type = item_type

  @override
  def parse(self, argument: Any) -> tuple:
    value = argument
    if isinstance(argument, str):
      try:
        value = ast.literal_eval(argument.strip())
      except (ValueError, SyntaxError) as error:
        raise ValueError(f"expected {self.syntactic_help}, got {argument!r}") from error
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    if isinstance(argument, list) and self._item_type is int:  # strings from a file
      value = tuple(int(item) if re.fullmatch(r"[+-]?\d+", item) else item for item in value)
    for item in value:
      if not isinstance(item, self._item_type) or isinstance(item, bool):
        raise ValueError(f"expected items of type {self._item_type.__name__}, got {argument!r}")
    return value

  @override
  def flag_type(self) -> str:
    return "tuple"


class _TupleSerializer(absl.flags.ArgumentSerializer):
  @override
  def serialize(self, value: tuple) -> str:
    return repr(value)


def names(cls: type, prefix: str = "") -> Iterator[str]:
  """Yields the dotted names of all options of a dataclass."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    if HELP in field.metadata:
      yield f"{prefix}{field.name}"
    else:
      yield from names(hints[field.name], f"{prefix}{field.name}.")


def expand(argument: str, short: Mapping[str, str]) -> str:
  """Returns an argument of a command line with the own name of its flag instead of a short one."""
  dashes, name, rest = re.fullmatch(r"(-*)([\w.]*)(.*)", argument, re.DOTALL).groups()
  return dashes + short[name] + rest if dashes and name in short else argument


def define(values: absl.flags.FlagValues, prefix: str, cls: type) -> None:
  """Defines one flag for every option of a dataclass."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    name = f"{prefix}.{field.name}" if prefix else field.name
    if HELP in field.metadata:
      _define_one(values, name, hints[field.name], field)
    else:
      define(values, name, hints[field.name])


def _define_one(
  values: absl.flags.FlagValues, name: str, annotation: Any, field: dataclasses.Field
) -> None:
  text, default, base = field.metadata[HELP], field.default, optional_base(annotation)
  own = {"flag_values": values, "module_name": _MODULE}
  if field.metadata[REPEATED]:
    absl.flags.DEFINE_multi_string(name, list(default), text, **own)
  elif field.metadata[CHOICES]:
    absl.flags.DEFINE_enum(name, default, list(field.metadata[CHOICES]), text, **own)
  elif base is bool:
    absl.flags.DEFINE_bool(name, default, text, **own)
  elif base is int:
    bounds = {"lower_bound": -(2**31), "upper_bound": 2**31 - 1}  # jax's counters are int32
    absl.flags.DEFINE_integer(name, default, text, **bounds, **own)
  elif base is float:
    absl.flags.DEFINE_float(name, default, text, **own)
  elif base is str:
    absl.flags.DEFINE_string(name, default, text, **own)
  elif typing.get_origin(base) is tuple:
    parser = TupleParser(typing.get_args(base)[0])
    absl.flags.DEFINE(parser, name, default, text, serializer=_TupleSerializer(), **own)
  else:
    raise TypeError(f"option {name}: flags of type {annotation} are not supported")
