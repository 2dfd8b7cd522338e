"""Command-line flags generated from frozen dataclasses: the one typed table of a command.

Each library declares its options as a dataclass, a name, a type, a default and a help text per
field; `define` turns them into plain absl flags (dotted names for nested groups, so that absl's
help and "did you mean" work for every one), and `read` gives the dataclass back, filled in and
validated. Only commands call `define` and `read`.
"""

import ast
import dataclasses
import logging as standard_logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, logging
from absl import flags as absl_flags

from ll3m.core import storage

_HELP = "help"
_CHOICES = "choices"
_REPEATED = "repeated"

# --help lists the flags of the module sys.argv[0]: the command, whose table all of these are.
_COMMAND = {"module_name": sys.argv[0]}

# Errors whose message is all that the person who typed needs.
_EXPLAINED = (
  ValueError,
  NotImplementedError,
  OSError,
  FloatingPointError,
  MemoryError,
  absl_flags.Error,
)

_DEBUG = absl_flags.DEFINE_bool("debug", False, "Show the full traceback of an error.", **_COMMAND)


def option(
  default: Any,
  help: str,
  *,
  choices: Sequence[str] | None = None,
  repeated: bool = False,
) -> Any:
  """Declares a dataclass field that is also a flag.

  Args:
    default: the field's default; None where the field's type allows it.
    help: what the flag does, with its unit.
    choices: the strings that are allowed, if they are few.
    repeated: the flag may be given several times; the field is a tuple of strings.

  Returns:
    A `dataclasses.field`.
  """
  return dataclasses.field(
    default=default, metadata={_HELP: help, _CHOICES: choices, _REPEATED: repeated}
  )


def group(cls: type) -> Any:
  """Declares a field that holds a nested dataclass of options (a dotted prefix)."""
  return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
  """The option of every command that reads checkpoints."""

  verify: bool = option(
    True, "Compare a checkpoint's files with the checksums that were saved with it."
  )


class _LiteralTupleParser(absl_flags.ArgumentParser):
  """Parses a tuple written as a Python literal: "('targets', )" or "(2048,)"."""

  syntactic_help = "a Python tuple, e.g. (2048,)"

  def __init__(self, item_type: type):
    super().__init__()
    self._item_type = item_type

  def parse(self, argument: Any) -> tuple:
    if isinstance(argument, tuple):
      return argument
    try:
      value = ast.literal_eval(argument.strip())
    except (ValueError, SyntaxError) as error:
      raise ValueError(f"expected {self.syntactic_help}, got {argument!r}") from error
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    for item in value:
      if not isinstance(item, self._item_type) or isinstance(item, bool):
        raise ValueError(f"expected items of type {self._item_type.__name__}, got {argument!r}")
    return value

  def flag_type(self) -> str:
    return "tuple"


class _TupleSerializer(absl_flags.ArgumentSerializer):
  def serialize(self, value: tuple) -> str:
    return repr(value)


def _optional_base(annotation: Any) -> Any:
  """Strips `| None` from a type."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    (base,) = (a for a in typing.get_args(annotation) if a is not type(None))
    return base
  return annotation


def _define_one(name: str, annotation: Any, field: dataclasses.Field) -> None:
  text, default = field.metadata[_HELP], field.default
  base = _optional_base(annotation)
  if field.metadata[_REPEATED]:
    absl_flags.DEFINE_multi_string(name, list(default), text, **_COMMAND)
  elif field.metadata[_CHOICES]:
    absl_flags.DEFINE_enum(name, default, list(field.metadata[_CHOICES]), text, **_COMMAND)
  elif base is bool:
    absl_flags.DEFINE_bool(name, default, text, **_COMMAND)
  elif base is int:
    bounds = {"lower_bound": -(2**31), "upper_bound": 2**31 - 1}  # more fits no counter of jax's
    absl_flags.DEFINE_integer(name, default, text, **bounds, **_COMMAND)
  elif base is float:
    absl_flags.DEFINE_float(name, default, text, **_COMMAND)
  elif base is str:
    absl_flags.DEFINE_string(name, default, text, **_COMMAND)
  elif typing.get_origin(base) is tuple:
    parser = _LiteralTupleParser(typing.get_args(base)[0])
    absl_flags.DEFINE(parser, name, default, text, serializer=_TupleSerializer(), **_COMMAND)
  else:
    raise TypeError(f"option {name}: flags of type {annotation} are not supported")


def define(prefix: str, cls: type) -> None:
  """Defines one absl flag for every option of a dataclass.

  Args:
    prefix: what stands before the dot in the flags' names; empty for none.
    cls: a frozen dataclass whose fields were declared with `option` and `group`.
  """
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    name = f"{prefix}.{field.name}" if prefix else field.name
    if _HELP in field.metadata:
      _define_one(name, hints[field.name], field)
    else:
      define(name, hints[field.name])


def read[T](prefix: str, cls: type[T], *, fallback: str | None = None) -> T:
  """Returns the dataclass with the values that were given on the command line.

  Args:
    prefix: as in `define`.
    cls: as in `define`.
    fallback: another prefix that was defined with the same dataclass; a flag that was not given
      takes that prefix's value.

  Raises:
    ValueError: what the dataclass's own validation says.
  """
  values = {}
  for field in dataclasses.fields(cls):
    name = f"{prefix}.{field.name}" if prefix else field.name
    other = f"{fallback}.{field.name}" if fallback else None
    if _HELP in field.metadata:
      value = absl_flags.FLAGS[name if given(name) or other is None else other].value
      values[field.name] = tuple(value) if field.metadata[_REPEATED] else value
    else:
      values[field.name] = read(name, typing.get_type_hints(cls)[field.name], fallback=other)
  try:
    return cls(**values)
  except ValueError as error:
    # A dataclass's messages begin with the name of the field; the person who typed knows a flag.
    if prefix and re.match(r"\w*", str(error))[0] in values:
      raise ValueError(f"--{prefix}.{error}") from error
    raise


def given(name: str) -> bool:
  """Says whether a flag was set on the command line, as opposed to left at its default."""
  return absl_flags.FLAGS[name].present > 0


def refuse(prefix: str, why: str) -> None:
  """Refuses a flag that was given and has no effect.

  Args:
    prefix: its name, or that of a group of flags.
    why: ends the sentence, e.g. "without --eval_steps".

  Raises:
    ValueError: it, or one of the group, was given.
  """
  for name in absl_flags.FLAGS:
    if (name == prefix or name.startswith(f"{prefix}.")) and given(name):
      raise ValueError(f"--{name} has no effect {why}")


def require(value: Any, name: str) -> None:
  """Demands that a flag was given.

  Raises:
    ValueError: if its value is None or empty.
  """
  if value is None or value == "" or value == ():
    raise ValueError(f"--{name} must be given")


def to_dict(config: Any, prefix: str = "") -> dict[str, Any]:
  """Flattens a dataclass of options to {dotted flag name: value}."""
  flat = {}
  for field in dataclasses.fields(config):
    name = f"{prefix}.{field.name}" if prefix else field.name
    value = getattr(config, field.name)
    flat |= {name: value} if _HELP in field.metadata else to_dict(value, name)
  return flat


def run(main: Callable[[], None]) -> None:
  """Runs a command: parses flags, then `main()`; any error ends as one sentence on stderr.

  Exits with 0 when main returns or help was asked for, 1 when main raises, 2 when the flags are
  wrong, 130 when it is interrupted. With --debug the traceback is printed before the sentence.
  """

  def parse(argv: list[str]) -> list[str]:
    rest = absl_flags.FLAGS(argv)
    if len(rest) > 1:
      stray = " ".join(rest[1:])
      raise absl_flags.IllegalFlagValueError(
        f"unexpected arguments: {stray} (flags are written --name=value, without spaces)"
      )
    return rest

  def guarded_parse(argv: list[str]) -> list[str]:
    # Parse errors are ours to print in one line; absl's help flags exit with 1 while it parses.
    try:
      return parse(argv)
    except absl_flags.Error as error:
      _exit_with(error, status=2)
    except SystemExit:
      sys.exit(0)

  def guarded_main(_: Sequence[str]) -> None:
    if not given("verbosity"):  # the libraries' progress reports are not the user's
      logging.set_verbosity(logging.INFO if _DEBUG.value else logging.WARNING)
    if not _DEBUG.value:
      logging.get_absl_handler().addFilter(_unseen_without_traceback)
      logging.get_absl_handler().setFormatter(_Sentence())
    try:
      storage.prepare(sys.argv[1:])
      main()
    except Exception as error:  # the boundary between library errors and the person who typed
      end(error)
    except KeyboardInterrupt:
      _exit_with(InterruptedError("interrupted"), status=130)

  app.run(guarded_main, flags_parser=guarded_parse)


class _Sentence(standard_logging.Formatter):
  """Formats a record as errors are printed, without absl's prefix of place and time.

  What a library logs as an error is a warning: an error of ours ends the command.
  """

  def format(self, record: standard_logging.LogRecord) -> str:
    level = "warning" if record.levelno >= standard_logging.WARNING else record.levelname.lower()
    return f"{level}: {' '.join(record.getMessage().split())}"


def _unseen_without_traceback(record: standard_logging.LogRecord) -> bool:
  """Leaves of what a library logs the sentence, unless the library's own handler prints it too."""
  record.exc_info = record.exc_text = None
  logger = standard_logging.getLogger(record.name)
  while logger.parent is not None and not logger.handlers:
    logger = logger.parent
  return logger.parent is None


def sentence(error: Exception) -> str:
  """Returns what an error says to the person who typed, on one line."""
  if answer := storage.explain(str(error)):
    return answer
  text = " ".join(str(error).split()) or type(error).__name__
  if isinstance(error, _EXPLAINED):
    return text
  return f"{type(error).__name__}: {text} (--debug shows the traceback)"


def end(error: Exception) -> typing.NoReturn:
  """Ends the process as `run` does when main raises this error."""
  if _DEBUG.value:
    traceback.print_exception(error)
  _exit_with(error, status=1)


def _exit_with(error: Exception, status: int) -> typing.NoReturn:
  sys.stdout.flush()
  print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
  # A library's background threads (TensorFlow's, Orbax's) must not hold the exit back, nor
  # write after the sentence that says what went wrong.
  os._exit(status)
