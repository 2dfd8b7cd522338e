"""docs/commands.md is what the flags' tables say, and has every flag that absl knows."""

import importlib
from pathlib import Path

import pytest

from ll3m.core import flags
from tools import command_docs

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()


def test_the_page_is_up_to_date():
  """If not: python tools/command_docs.py > docs/commands.md"""
  assert command_docs.page() + "\n" == PAGE


@pytest.mark.parametrize("verb", command_docs.VERBS)
def test_help_has_every_flag_that_the_parser_knows(verb):
  groups = importlib.import_module(f"ll3m.{verb}").FLAG_GROUPS
  parsed = flags.Flags(groups, ())
  found = {line.split("=")[0].split("]")[-1].strip(" -") for line in parsed.help().splitlines()
           if line.startswith("  --")}  # fmt: skip
  assert found == set(parsed._values)
