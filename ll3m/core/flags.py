"""The flags of a command, built from dataclasses of options, and the handling of its errors.

A command is a function `main(argv=None) -> int`. absl parses its flags, but none is defined in
absl's global FLAGS, so any number of commands can be imported into one process and called there one
after another:

  FLAG_GROUPS = {"": EvaluateOptions, "eval_dataset": DatasetConfig}

  def main(argv: Sequence[str] | None = None) -> int:
    return flags.call(_evaluate, FLAG_GROUPS, argv, doc=__doc__)

Values come from the command line, then from --config files, then from the defaults. Only commands
and tools import this module.
"""

import dataclasses
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import absl.flags

from ll3m.core import config_files, flag_help, library_logs, object_store
from ll3m.core.flag_types import TupleParser, define, expand, explain, names
from ll3m.core.options import HELP, REPEATED, Fallback, option

_HELP_FLAGS = ("--help", "-help", "--helpshort", "--helpfull", "-h")
_BACKTICKED = re.compile(r"`([\w.]+)`")

# Errors whose message is all that the user needs.
_EXPLAINED = (
  ValueError,
  NotImplementedError,
  OSError,
  FloatingPointError,
  MemoryError,
  absl.flags.Error,
)


class UsageError(ValueError):
  """A flag or its value is wrong."""


@dataclasses.dataclass(frozen=True)
class CommonOptions:
  """The flags of every command."""

  config: tuple[str, ...] = option(
    (),
    "YAML file of flags, nested or with dotted names, or a run's flags.json. May be repeated: "
    "later files override earlier ones, and flags override files.",
    repeated=True,
  )
  debug: bool = option(False, "Show full tracebacks and all log messages of libraries.")


def help_sections(groups: Mapping[str, type]) -> list[tuple[str, str, type]]:
  """Returns heading, prefix and dataclass of each group of a command's flags, as --help has them.

  Args:
    groups: Dataclass of options of each prefix ("" for none).
  """
  own = [(f"{prefix} flags" if prefix else "flags", prefix, cls) for prefix, cls in groups.items()]
  return [*own, ("flags of every command", "", CommonOptions)]


class Flags:
  """The flags of one call to a command, and their values."""

  def __init__(
    self,
    groups: Mapping[str, type],
    arguments: Sequence[str],
    *,
    fallbacks: Mapping[str, Fallback] | None = None,
    short: Mapping[str, str] | None = None,
    doc: str = "",
  ):
    """Parses a command line.

    Args:
      groups: The dataclass of options of each prefix ("" for none).
      arguments: The command line, without the command's name.
      fallbacks: Sources of values that were not given, by the prefix of the group.
      short: Short names of flags, with the flags' own names.
      doc: Text that --help prints before the flags.

    Raises:
      UsageError: A flag is unknown or set twice, a value has a wrong type, or a file is invalid.
      FileNotFoundError: A --config file does not exist.
    """
    self._groups = dict(groups)
    self._fallbacks = dict(fallbacks or {})
    self._short, self._doc = dict(short or {}), doc
    # How messages name a flag that has a short name: as it was typed, or else by the short name.
    typed = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    self._as_typed = {name: short for short, name in self._short.items() if name not in typed}
    self._values = absl.flags.FlagValues()
    self._from_file: set[str] = set()
    for prefix, cls in (*groups.items(), ("", CommonOptions)):
      define(self._values, prefix, cls)
    if any(argument in _HELP_FLAGS for argument in arguments):
      self._values.mark_as_parsed()
      return
    try:
      rest = self._values(["command", *expand(arguments, self._short)])
    except (absl.flags.Error, ValueError) as error:
      raise UsageError(explain(error, [*self._short, *self._values])) from error
    if len(rest) > 1:
      raise UsageError(
        f"unexpected arguments: {' '.join(rest[1:])} (flags are written --name=value, without "
        f"spaces)"
      )
    typed = {name for name in self._values if self.given(name)}
    for file in self._values["config"].value:
      self._read_file(file, typed)

  @property
  def debug(self) -> bool:
    """Whether --debug was given."""
    return self._values["debug"].value

  def help(self) -> str:
    """Returns what --help prints."""
    return flag_help.render(self._doc, help_sections(self._groups), self._short)

  def _read_file(self, file: str, typed: Iterable[str]) -> None:
    known = [*(name for name in self._values if name != "config"), *self._short]
    read = config_files.read(file, known)
    for short, (value, place) in read.items():
      name = self._short.get(short, short)
      if name != short and read.get(name, (None,))[0] is not None:
        raise UsageError(f"`config`: {place}: {short} is {name}, which the file sets too")
      if value is None or name in typed:
        continue
      flag = self._values[name]
      flag.present = 0  # an earlier file may have set it
      takes_list = isinstance(flag, absl.flags.MultiFlag) or isinstance(flag.parser, TupleParser)
      if isinstance(value, list) and not takes_list:
        raise UsageError(f"`config`: {place}: {name} must be one value, got the list {value}")
      try:
        flag.parse(value)
      except absl.flags.Error as error:
        reason = str(error).partition(": ")[2] or str(error)
        given = "" if repr(value) in reason else f", got {value!r}"
        raise UsageError(f"`config`: {place}: {name}: {reason}{given}") from error
      self._from_file.add(name)

  def __getitem__(self, prefix: str) -> Any:
    """Returns the dataclass of a group, filled in and validated.

    Raises:
      UsageError: A value is invalid, or a flag that was given has no effect.
    """
    return self._read(prefix, self._groups[prefix], self._fallbacks.get(prefix))

  def _read(self, prefix: str, cls: type, fallback: Fallback | None, path: str = "") -> Any:
    values = {}
    for field in dataclasses.fields(cls):
      name = f"{prefix}.{field.name}" if prefix else field.name
      within = f"{path}.{field.name}" if path else field.name
      if HELP not in field.metadata:
        nested = typing.get_type_hints(cls)[field.name]
        values[field.name] = self._read(name, nested, fallback, within)
        continue
      other = fallback.source_of(within) if fallback else None
      value = self._values[name if self.given(name) or other is None else other].value
      values[field.name] = tuple(value) if field.metadata[REPEATED] else value
    try:
      config = cls(**values)
    except ValueError as error:
      raise UsageError(self._qualified(str(error), prefix)) from error
    if hasattr(config, "without_effect"):
      self.refuse(config.without_effect(), prefix)
    return config

  def given(self, name: str) -> bool:
    """Returns whether a flag was set, on the command line or in a file, even to its default."""
    return self._values[name].present > 0

  def refuse(self, reasons: Mapping[str, str], prefix: str = "") -> None:
    """Raises if a flag was given that has no effect.

    A default value in a file does not count as given, because a run's flags.json has every flag.

    Args:
      reasons: The end of the message, such as "without `eval_steps`", for each flag or group of
        flags without effect.
      prefix: The prefix of these names.

    Raises:
      UsageError: One of these flags, or a flag of one of these groups, was given.
    """
    for name, why in reasons.items():
      refused = f"{prefix}.{name}" if prefix else name
      for flag in self._values:
        if (flag == refused or flag.startswith(f"{refused}.")) and self._is_set(flag):
          raise UsageError(self._qualified(f"`{flag}` has no effect {why}", prefix))

  def _is_set(self, name: str) -> bool:
    flag = self._values[name]
    return self.given(name) and not (name in self._from_file and flag.value == flag.default)

  def settings(self, *, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the values of all flags; as a --config file, they repeat the call.

    Args:
      leave_out: Prefixes of groups to omit.

    Returns:
      Values by flag; None for a flag that was not given and takes the value of another flag.
    """
    settings = {}
    for prefix, cls in self._groups.items():
      if prefix and prefix in leave_out:
        continue
      fallback = self._fallbacks.get(prefix)
      for name in names(cls):
        flag = f"{prefix}.{name}" if prefix else name
        borrows = fallback and fallback.source_of(name) and not self.given(flag)
        settings[flag] = None if borrows else self._values[flag].value
    return settings

  @contextmanager
  def within(self, prefix: str) -> Iterator[None]:
    """Adds a group's prefix to the option names in the errors of a library.

    Raises:
      Exception: The library's error. For the prefix "eval_dataset", `path` in its message becomes
        `eval_dataset.path`.
    """
    try:
      yield
    except _EXPLAINED as error:
      text = self._qualified(str(error), prefix)
      if text == str(error):
        raise
      raise type(error)(text) from error

  def _qualified(self, text: str, prefix: str) -> str:
    """Adds a group's prefix to the backticked names of its options."""

    def complete(match: re.Match) -> str:
      name = f"{prefix}.{match[1]}"
      return f"`{name}`" if prefix and name in self._values else match[0]

    return _BACKTICKED.sub(complete, text)

  def sentence(self, error: Exception) -> str:
    """Returns the one-line message of an error for the user, with options written as flags."""
    if answer := object_store.explain(str(error)):
      return answer
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, _EXPLAINED):
      return f"{type(error).__name__}: {text} (--debug shows the traceback)"
    return self.spell(text)

  def spell(self, text: str) -> str:
    """Returns a text with its backticked options written as flags."""
    known, typed = {*self._values, *self._short}, self._as_typed
    return _BACKTICKED.sub(lambda m: f"--{typed.get(m[1], m[1])}" if m[1] in known else m[0], text)

  def exit_code(self, error: Exception) -> int:
    """Returns 2 if an error is about a flag (its message begins with one), else 1."""
    about_a_flag = isinstance(error, _EXPLAINED) and self.sentence(error).startswith("--")
    return 2 if about_a_flag or isinstance(error, UsageError) else 1


def call(
  run: Callable[[Flags], int | None],
  groups: Mapping[str, type],
  argv: Sequence[str] | None = None,
  *,
  doc: str | None = "",
  fallbacks: Mapping[str, Fallback] | None = None,
  short: Mapping[str, str] | None = None,
) -> int:
  """Runs a command: parses its flags, connects its processes, and reports errors in one sentence.

  Args:
    run: The body of the command; returns its exit code, or None for 0.
    groups: The dataclass of options for each prefix. If "jax_distributed" is among them, the
      processes that it describes are connected.
    argv: The command line, without the command's name. None for this process's own; an error then
      ends the process at once, even if threads of libraries are still running.
    doc: Text that --help prints before the flags.
    fallbacks: Sources of values that were not given, by the prefix of the group.
    short: Short names of flags, with the flags' own names.

  Returns:
    The exit code: that of `run`; 0 for --help; 2 if a flag is wrong; 130 if the command was
    interrupted; 1 for any other error. With --debug the traceback precedes the message.
  """
  arguments = sys.argv[1:] if argv is None else list(argv)
  if not absl.flags.FLAGS.is_parsed():
    absl.flags.FLAGS.mark_as_parsed()  # libraries read flags of their own from it
  flags = Flags(groups, (), short=short, doc=doc or "")
  debug = "--debug" in arguments
  try:
    flags = Flags(groups, arguments, fallbacks=fallbacks, short=short, doc=doc or "")
    if any(argument in _HELP_FLAGS for argument in arguments):
      print(flags.help())
      return 0
    debug = flags.debug
    configs = {prefix: flags[prefix] for prefix in groups}  # validates all flags
    with library_logs.shown(debug=debug):
      object_store.prepare(map(str, flags.settings().values()))
      with _processes(configs, flags, debug=debug):
        return run(flags) or 0
  except Exception as error:  # the boundary between library errors and the user
    return _report(error, flags, debug=debug, ends=argv is None)
  except KeyboardInterrupt:
    return _report(InterruptedError("interrupted"), flags, debug=False, ends=argv is None, code=130)


def _processes(configs: Mapping[str, Any], flags: Flags, *, debug: bool) -> Any:
  """Connects the processes of a command that can run on several hosts."""
  if "jax_distributed" not in configs:
    return nullcontext()
  from ll3m.core import distributed

  return distributed.joined(
    configs["jax_distributed"],
    flags.settings(),
    describe=flags.sentence,
    end=lambda error: _report(error, flags, debug=debug, ends=True),
  )


def _report(
  error: Exception, flags: Flags, *, debug: bool, ends: bool, code: int | None = None
) -> int:
  """Prints the message of an error; then ends the process if `ends`, else returns the code."""
  if debug:
    traceback.print_exception(error)
  sys.stdout.flush()
  print(f"error: {flags.sentence(error)}", file=sys.stderr, flush=True)
  code = flags.exit_code(error) if code is None else code
  if ends:
    # Background threads of libraries (TensorFlow, Orbax) must not delay the exit, nor print
    # anything after the error message.
    os._exit(code)
  return code
