"""The checks of wording find what they name, on the right line, and let good sentences pass."""

import pytest

from tools import lint_prose

ENTRIES = '''"""Makes steps.

  Args:
    steps: that were made.
    spec: Of the call, which of-words begin in capitals too.
    size: number of items.
    good: Number of items, in which
      of: continues a sentence.
    *rest: In bytes.
    text: `None` for all.

  Raises:
    ValueError: it is wrong.

  Example:
    of: that is no entry.
  """'''


def test_entries_must_stand_alone():
  found = list(lint_prose.check_docstring(ENTRIES.strip('"'), 10))
  assert [problem.line for problem in found] == [13, 14, 15, 18, 22]


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("Fine.\nThe step is passed\nover for another.", 2),
    ("It is told.", 1),
    ("Fine.\n\nThe run goes on from there.", 3),
    ("Of two, the first.", 1),
    ("A room of the house.", 1),
    ("Keys are left out.", 1),
    ("Arguments as there.", 1),
  ],
)
def test_phrases_are_found_on_their_lines(text, line):
  (problem,) = lint_prose.check_text(text, 1)
  assert problem.line == line


@pytest.mark.parametrize(
  "text",
  [
    "Half of the keys. Of course not.",
    "There is room for two.",
    "The loop goes on.",
    "As there are two.",
    "mushrooms of all kinds",
  ],
)
def test_other_sentences_pass(text):
  assert not list(lint_prose.check_text(text, 1))


def test_strings_and_comments_are_checked(tmp_path, capsys):
  file = tmp_path / "code.py"
  file.write_text('X = f"{1} is passed over"\n# It is\n# told at once.\nY = "fine"\n')
  assert lint_prose.main([str(file)]) == 1
  out = capsys.readouterr().out
  assert f"{file}:1: " in out and f"{file}:2: " in out and f"{file}:4" not in out
