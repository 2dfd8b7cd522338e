"""The flags of a command as text: for --help, and for docs/commands.md."""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ll3m.core.options import CHOICES, HELP, REPEATED

_PLACEHOLDERS = {int: "N", float: "X", str: "TEXT"}
_COLUMNS = 80


class Entry(NamedTuple):
  """One flag.

  Attributes:
    name: Its name, without dashes.
    usage: How it is written, as "--seed=N" or "--[no]json".
    default: Its default, as it would be written; empty if it has none.
    text: What it sets.
  """

  name: str
  usage: str
  default: str
  text: str


def optional_base(annotation: Any) -> Any:
  """Returns a type without `| None`."""
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    (base,) = (a for a in typing.get_args(annotation) if a is not type(None))
    return base
  return annotation


def entries(prefix: str, cls: type) -> Iterator[Entry]:
  """Yields an entry for every option of a dataclass: its own first, then those of its bases.

  Args:
    prefix: Prefix of the flags' names, without its dot; "" for none.
    cls: Dataclass of options; see `ll3m.core.options`.
  """
  hints = typing.get_type_hints(cls)

  def depth(field: dataclasses.Field) -> int:
    return next(i for i, c in enumerate(cls.__mro__) if field.name in c.__dict__["__annotations__"])

  for field in sorted(dataclasses.fields(cls), key=depth):
    name = f"{prefix}.{field.name}" if prefix else field.name
    if HELP not in field.metadata:
      yield from entries(name, hints[field.name])
      continue
    base = optional_base(hints[field.name])
    if base is bool:
      usage, default = f"--[no]{name}", str(field.default)
    else:
      usage = f"--{name}={_placeholder(base, field)}"
      default = "" if field.default in (None, "", ()) else str(field.default)
    yield Entry(name, usage, default, field.metadata[HELP])


def _placeholder(base: Any, field: dataclasses.Field) -> str:
  if field.metadata[REPEATED]:
    return "TEXT"
  if field.metadata[CHOICES]:
    return "|".join(field.metadata[CHOICES])
  if typing.get_origin(base) is tuple:
    return f"({_PLACEHOLDERS[typing.get_args(base)[0]]},)"
  return _PLACEHOLDERS[base]


def short_entries(
  sections: Iterable[tuple[str, str, type]], short: Mapping[str, str]
) -> Iterator[Entry]:
  """Yields an entry for every short name of a flag, with the flag's text.

  Args:
    sections: Heading, prefix and dataclass of each group of flags.
    short: Short names, with the flags' own names.
  """
  found = {entry.name: entry for _, prefix, cls in sections for entry in entries(prefix, cls)}
  for name, own in short.items():
    entry = found[own]
    yield entry._replace(
      # A tuple may be given as its only item.
      usage=entry.usage.replace(own, name, 1).replace("=(N,)", "=N"),
      default=entry.default.strip("(,)"),
      text=f"{entry.text} Short for --{own}.",
    )


def render(
  doc: str, sections: Iterable[tuple[str, str, type]], short: Mapping[str, str] | None = None
) -> str:
  """Returns what --help prints.

  Args:
    doc: What the command does.
    sections: Heading, prefix and dataclass of each group of flags.
    short: Short names of flags, which come first.
  """
  lines, sections = [doc.strip()], list(sections)
  groups = [(heading, list(entries(prefix, cls))) for heading, prefix, cls in sections]
  if short:
    groups.insert(0, ("short names of flags", list(short_entries(sections, short))))
  for heading, found in groups:
    lines += ["", f"{heading}:"]
    for entry in found:
      default = f" (default: {entry.default})" if entry.default else ""
      text = textwrap.fill(f"{entry.text}{default}", _COLUMNS - 6)
      lines += [f"  {entry.usage}", textwrap.indent(text, " " * 6)]
  return "\n".join(lines)
