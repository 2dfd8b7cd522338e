"""Prints docs/commands.md, every command with every flag, from the flags' own tables.

python tools/command_docs.py > docs/commands.md
"""

import collections
import dataclasses
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ll3m.core import flag_help, flags

VERBS = ("convert", "inspect", "train", "evaluate", "generate", "export", "plan")
HEAD = """# Commands

<!-- Written by tools/command_docs.py: change the help texts in the code, and run it again. -->

Each command is `python -m ll3m.NAME --flag=value ...`. Its exit code is 0 on success, 2 if a flag
is wrong, 1 for any other error, 75 if SIGTERM stopped a training run after saving it, and 130 after
Ctrl-C. Flags can also be read from files (`--config`).

`--[no]flag` is written `--flag`, `--noflag` or `--flag=False`. In groups of flags that several
commands share, GROUP is the name of the group; for datasets it is `train_dataset`,
`eval_dataset` or `dataset`."""


@dataclasses.dataclass(frozen=True)
class DocsOptions:
  """This tool has no flags of its own."""


FLAG_GROUPS = {"": DocsOptions}


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the page; see `flags.call` for `argv` and the exit code that it returns."""
  return flags.call(lambda given: print(page()), FLAG_GROUPS, argv, doc=__doc__)


def page() -> str:
  """Returns the page as Markdown."""
  commands = {verb: importlib.import_module(f"ll3m.{verb}") for verb in VERBS}
  shared = shared_groups({verb: module.FLAG_GROUPS for verb, module in commands.items()})
  parts = [HEAD]
  for verb, module in commands.items():
    parts += ["", f"## {verb}", "", documentation(module.__doc__)]
    if short := getattr(module, "SHORT", None):
      sections = [("", prefix, cls) for prefix, cls in module.FLAG_GROUPS.items()]
      parts += ["", *table(flag_help.short_entries(sections, short))]
    for prefix, cls in module.FLAG_GROUPS.items():
      if cls not in shared:
        parts += ["", *table(flag_help.entries(prefix, cls))]
    also = [
      f"[`--{prefix}.*`](#{shared[cls]})"
      for prefix, cls in module.FLAG_GROUPS.items()
      if cls in shared
    ]
    also.append("[`--config`, `--debug`](#flags-of-every-command)")
    parts += ["", f"Also: {', '.join(also)}."]
  for cls, anchor in shared.items():
    parts += [
      "",
      f"## {anchor}",
      "",
      cls.__doc__.strip(),
      "",
      *table(flag_help.entries("GROUP", cls)),
    ]
  parts += ["", "## Flags of every command", "", *table(flag_help.entries("", flags.CommonOptions))]
  return "\n".join(parts)


def documentation(docstring: str) -> str:
  """Returns a command's docstring as Markdown: paragraphs that are commands become code."""
  paragraphs = docstring.strip().split("\n\n")
  return "\n\n".join(
    f"```shell\n{text}\n```" if text.startswith("python -m ") else text for text in paragraphs
  )


def shared_groups(commands: Mapping[str, Mapping[str, type]]) -> dict[type, str]:
  """Returns the classes of options that several groups use, with the names of their sections.

  Args:
    commands: The dataclass of options of each prefix, by command.
  """
  prefixes = collections.defaultdict(list)
  for groups in commands.values():
    for prefix, cls in groups.items():
      prefixes[cls].append(prefix)
  return {
    cls: sorted(names)[-1].rpartition("_")[2] if cls.__name__ == "DatasetConfig" else names[0]
    for cls, names in prefixes.items()
    if len(names) > 1 and names[0]
  }


def table(entries: Iterable[flag_help.Entry]) -> Iterator[str]:
  """Yields the lines of a table of flags."""
  yield "| flag | default | meaning |"
  yield "|---|---|---|"
  for _, usage, default, text in entries:
    cells = (f"`{usage}`", f"`{default}`" if default else "", text)
    yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
  sys.exit(main())
