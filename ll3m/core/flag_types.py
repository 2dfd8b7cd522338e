"""Typed absl flags for the options of a dataclass."""

import ast
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


_ARGUMENT = re.compile(r"(-*)([\w.]*)(.*)", re.DOTALL)


def expand(arguments: Sequence[str], short: Mapping[str, str]) -> list[str]:
  """Returns a command line with the flags' own names instead of the short ones.

  Raises:
    ValueError: A flag has both of its names.
  """
  parts = [_ARGUMENT.fullmatch(argument).groups() for argument in arguments]
  typed = {name for dashes, name, _ in parts if dashes}
  for name in typed & short.keys():
    if short[name] in typed:
      raise ValueError(f"--{name} and --{short[name]} are the same flag: give only one of them")
  return [
    dashes + (short.get(name, name) if dashes else name) + rest for dashes, name, rest in parts
  ]


def explain(error: Exception, known: Iterable[str]) -> str:
  """Returns the message of an error of absl; an unknown flag is compared with all `known` names."""
  if not isinstance(error, absl.flags.UnrecognizedFlagError):
    return str(error)
  close = difflib.get_close_matches(error.flagname, list(known), n=1)
  hint = f" (did you mean --{close[0]}?)" if close else ""
  return f"unknown flag --{error.flagname}{hint}"


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
