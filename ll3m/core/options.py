"""Options of commands and libraries: frozen dataclasses, one field per option.

A field has a name, a type, a default and a help text. For commands, `ll3m.core.flags` turns each
field into a flag; Python programs construct the dataclass directly. Error messages, including those
of libraries, name an option in backticks ("`batch_size` must be at least 1, got 0"), and commands
print it as a flag.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

HELP = "help"
CHOICES = "choices"
REPEATED = "repeated"


def option(
  default: Any,
  help: str,
  *,
  choices: Sequence[str] | None = None,
  repeated: bool = False,
) -> Any:
  """Declares a dataclass field that is also a flag.

  Args:
    default: The field's default; None if the field's type allows it.
    help: Description of what the option sets, with its unit.
    choices: The allowed strings, if they are few.
    repeated: Whether the flag may be given several times; the field is then a tuple of strings.

  Returns:
    A `dataclasses.field`.
  """
  return dataclasses.field(
    default=default, metadata={HELP: help, CHOICES: choices, REPEATED: repeated}
  )


def group(cls: type) -> Any:
  """Declares a field that holds a nested dataclass of options (a dotted prefix)."""
  return dataclasses.field(default_factory=cls)


def to_dict(config: Any, prefix: str = "") -> dict[str, Any]:
  """Flattens a dataclass of options to {dotted name: value}."""
  flat = {}
  for field in dataclasses.fields(config):
    name = f"{prefix}.{field.name}" if prefix else field.name
    value = getattr(config, field.name)
    flat |= {name: value} if HELP in field.metadata else to_dict(value, name)
  return flat


def require(config: Any, *names: str) -> None:
  """Raises if an option that has no default was not given.

  Args:
    config: A dataclass of options.
    *names: The names of its fields.

  Raises:
    ValueError: One of the options is None or empty.
  """
  for name in names:
    if getattr(config, name) in (None, "", ()):
      raise ValueError(f"`{name}` must be given")


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
  """Prefixes errors about an option's value with the option's name.

  Raises:
    ValueError: The error of the block, with the name.
    FileNotFoundError: The error of the block, with the name.
  """
  try:
    yield
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(f"`{name}`: {error}") from error


@dataclasses.dataclass(frozen=True)
class Fallback:
  """The source of values for a group's options that were not given.

  Attributes:
    group: The prefix of the other group, which has the same dataclass.
    own: The options, or nested groups, that keep their own defaults.
  """

  group: str
  own: tuple[str, ...] = ()

  def source_of(self, name: str) -> str | None:
    """Returns the option that supplies the value of option `name`; None for its own default."""
    if any(name == own or name.startswith(f"{own}.") for own in self.own):
      return None
    return f"{self.group}.{name}"


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
  """The option of every command that reads checkpoints."""

  verify: bool = option(True, "Compare a checkpoint's files with the checksums saved beside them.")
