"""Checks the wording of docstrings, comments, messages and Markdown: `python tools/lint_prose.py`.

It holds the rules of CONTRIBUTING.md ("Language") that a pattern can hold: entries of `Args:`,
`Attributes:` and `Raises:` are phrases that stand alone, and `PHRASES` are not used.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# What is not written, and what is written instead.
PHRASES = {
  r"\bdemands? that\b": "raises if",
  r"\bpass(?:es|ed|ing)? over\b": "skip",
  r"\b(?:is|are|was|were) told\b": "is reported",
  r"\bg(?:o|oes|one|oing) on (?:from|where|with)\b|\bwent on\b": "resume, continue",
  r"\bas there\b(?! (?:is|are|was|were)\b)": "see X",
  r"\b(?:left|leaves?|leaving) out\b": "omit",
  r"\bsigns? of life\b": "keep-alive message, renewal",
  r"\blast words\b": "final message",
  r"\bin so many words\b": "explicitly",
  r"(?:^|[.;:] |\n)(?-i:Of) (?!course\b)": "a sentence with its subject first",
  r"\brooms?\b(?! (?:for|to|left|in)\b)": "package",
}
_PHRASES = [(re.compile(pattern, re.IGNORECASE), better) for pattern, better in PHRASES.items()]

_SECTIONS = ("Args:", "Attributes:", "Raises:")
_ENTRY = re.compile(r"^(?P<indent> *)(?P<name>\*{0,2}[A-Za-z_][\w.]*(?:, \w+)*): +(?P<text>\S.*)$")
# Words that continue the name of a parameter: "steps: that they took".
_CONTINUES = {"of", "that", "in", "to", "at", "for", "by", "on", "from", "with", "as", "which"}
_RULES_THEMSELVES = ("tools/lint_prose.py", "tests/tools/test_lint_prose.py")


class Problem(NamedTuple):
  """A place and what is wrong there."""

  line: int
  text: str


def check_docstring(docstring: str, first_line: int) -> Iterator[Problem]:
  """Checks the entries of a docstring's sections.

  Args:
    docstring: The text between its quotes.
    first_line: The number of the line on which it begins.

  Yields:
    A problem for each entry that does not stand alone.
  """
  section = None
  for number, line in enumerate(docstring.splitlines(), first_line):
    indent = len(line) - len(line.lstrip())
    if line.strip() in _SECTIONS:
      section = indent
    elif section is not None and line.strip() and indent <= section:
      section = None
    elif section is not None and indent == section + 2 and (entry := _ENTRY.match(line)):
      word = entry["text"].split()[0]
      if word.lower() in _CONTINUES:
        yield Problem(number, f"`{entry['name']}: {word} ...` continues the name")
      elif word[0].islower() and word.isalpha():
        yield Problem(number, f"`{entry['name']}: {word} ...` begins with a small letter")


def check_text(text: str, first_line: int) -> Iterator[Problem]:
  """Checks a text for `PHRASES`; they may be broken over lines.

  Args:
    text: A docstring, comment, message or document.
    first_line: The number of its first line.

  Yields:
    A problem for each use.
  """
  text = re.sub(r"[ \t]*\n[ \t]*(?!\n)", lambda m: "\n" * m[0].count("\n"), text)
  flat = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
  for pattern, better in _PHRASES:
    for found in pattern.finditer(flat):
      line = first_line + text[: found.start()].count("\n")
      yield Problem(line, f"{found[0].strip()!r}: write {better}")


def check_python(source: str) -> Iterator[Problem]:
  """Checks the docstrings, other strings and comments of a Python file."""
  tree = ast.parse(source)
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for node in ast.walk(tree):
    if isinstance(node, documented) and ast.get_docstring(node, clean=False):
      constant = node.body[0].value
      yield from check_docstring(constant.value, constant.lineno)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield from check_text(node.value, node.lineno)
  for first, comment in _comments(source):
    yield from check_text(comment, first)


def _comments(source: str) -> Iterator[tuple[int, str]]:
  """Yields comments with the numbers of their first lines; those on successive lines are one."""
  lines: list[str] = []
  first = last = 0
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type != tokenize.COMMENT:
      continue
    if lines and token.start[0] == last + 1:
      lines.append(token.string.lstrip("# "))
    else:
      if lines:
        yield first, "\n".join(lines)
      lines, first = [token.string.lstrip("# ")], token.start[0]
    last = token.start[0]
  if lines:
    yield first, "\n".join(lines)


def check_file(path: Path) -> list[Problem]:
  """Returns the problems of a Python or Markdown file, by line."""
  check = check_python if path.suffix == ".py" else lambda text: check_text(text, 1)
  return sorted(set(check(path.read_text())))


def main(argv: Sequence[str] | None = None) -> int:
  """Checks files, by default all Python and Markdown files that git tracks, and prints problems."""
  names = list(argv if argv is not None else sys.argv[1:])
  if not names:
    listed = subprocess.run(
      ["git", "ls-files", "*.py", "*.md"], capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.splitlines() if name not in _RULES_THEMSELVES]
  problems = [(name, problem) for name in names for problem in check_file(Path(name))]
  for name, problem in problems:
    print(f"{name}:{problem.line}: {problem.text}")
  return 1 if problems else 0


if __name__ == "__main__":
  sys.exit(main())
