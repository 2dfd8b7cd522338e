"""Files of rows, which are objects with fields: JSON Lines, JSON arrays, CSV, TSV and parquet.

This module does not import TensorFlow, because commands that only read prompts do not need it.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ll3m.data.shard_files import list_files
from ll3m.data.skipped_examples import Unusable
from ll3m.data.text_files import COMPRESSIONS, HEAD, read_bytes, require_utf8, split_lines

# Kinds of files, by the extension before any .gz or .zst.
KINDS = {
  ".jsonl": "json", ".json": "json", ".ndjson": "json",
  ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
  ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
}  # fmt: skip

_PARQUET = b"PAR1"
_SPACE = re.compile(r"[ \t\r\n]*")
# The beginning of an array of objects. A line of JSON Lines may be an array, but of other values.
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*(?:[{\]]|$)")


class RowFile(NamedTuple):
  """The rows or lines of one file, each of which can be read by its position.

  Attributes:
    file: Name of the file.
    kind: One of the values of `KINDS`.
    positions: Number (of the line, or of the row in a table), start and end of each row. It can be
      iterated once.
    read: Function from a start and an end to the row: the bytes of a line or of a JSON object, or
      the row of a table.
  """

  file: str
  kind: str
  positions: Iterable[tuple[int, int, int]]
  read: Callable[[int, int], bytes | dict[str, Any]]

  def place(self, number: int) -> str:
    """Returns the name of a row or line in messages, given its number."""
    is_table = self.kind in ("csv", "tsv", "parquet")
    return f"{self.file}, row {number}" if is_table else f"{self.file}:{number}"


def kind_of(file: str, head: bytes = b"") -> str | None:
  """Returns the kind of a file, or None if neither its name nor its beginning determines it.

  Args:
    file: Name of the file; a known extension determines the kind.
    head: First `HEAD` bytes of the decompressed content.
  """
  name = file.lower()
  for ending in COMPRESSIONS:
    name = name.removesuffix(ending)
  if kind := next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None):
    return kind
  if head.startswith(_PARQUET):
    return "parquet"
  return "json" if re.match(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*["}]', head) else None


def is_array(head: bytes) -> bool:
  """Returns whether JSON begins as an array of objects rather than as JSON Lines."""
  return _ARRAY.match(head) is not None


def open_rows(file: str) -> RowFile:
  """Opens a file of any kind.

  Raises:
    ValueError: The file is damaged, or is UTF-16 or UTF-32 instead of UTF-8.
  """
  data = read_bytes(file)
  head = data[:HEAD]
  kind = kind_of(file, head) or "text"
  if kind == "parquet":
    return _table(file, kind, _parquet, data)
  require_utf8(file, data)
  if kind in ("csv", "tsv"):
    return _table(file, kind, _csv, data)
  positions = _elements(file, data) if kind == "json" and is_array(head) else split_lines(data)
  return RowFile(file, kind, positions, lambda start, end: data[start:end])


def _elements(file: str, data: bytes | mmap.mmap) -> Iterator[tuple[int, int, int]]:
  """Yields the line, start and end of every element of a JSON array.

  The array is decoded as Latin-1, where each character is one byte. JSON's own characters are the
  same as in UTF-8.

  Raises:
    ValueError: The array ends early or is malformed; elements cannot be separated from there on.
  """
  text = str(data, "latin-1")
  decode = json.JSONDecoder().raw_decode

  def skip(start: int) -> int:
    return _SPACE.match(text, start).end()

  at = skip(text.index("[") + 1)
  line, closed = 1 + text.count("\n", 0, at), text[at : at + 1] == "]"
  while not closed:
    try:
      _, end = decode(text, at)
      after = skip(end)
      closed = text[after : after + 1] == "]"
      if not closed and text[after : after + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
    except json.JSONDecodeError as error:
      raise ValueError(f"{file}:{error.lineno}: not a JSON array: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
      raise ValueError(f"{file}:{line}: not a JSON array: {error}") from error
    yield line, at, end
    following = after if closed else skip(after + 1)
    line += text.count("\n", at, following)
    at = following
  end = skip(at + 1)
  if end < len(text):
    line += text.count("\n", at, end)
    raise ValueError(f"{file}:{line}: not a JSON array: more text after its end")


def _table(file: str, kind: str, read: Callable[[str, Any], Any], data: Any) -> RowFile:
  import datasets
  import pyarrow

  try:
    table = read(kind, pyarrow.BufferReader(pyarrow.py_buffer(data)))
  except (pyarrow.ArrowException, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ValueError(f"{file} is not a {kind} file: {reason}") from error
  names = table.column_names
  if repeated := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f"{file} has several columns named {repeated[0]!r}: rename them")
  rows = datasets.Dataset(table)
  return RowFile(
    file,
    kind,
    ((row + 1, row, row + 1) for row in range(len(rows))),
    lambda start, _: rows[start],
  )


def _parquet(_: str, source: Any) -> Any:
  from pyarrow import parquet

  return parquet.read_table(source)


def _csv(kind: str, source: Any) -> Any:
  """Reads every cell as text, so that "007", "NA" and empty cells are unchanged."""
  import pyarrow
  from pyarrow import csv

  parse = csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True)
  # One block, because a document must fit into a block, and one thread, because otherwise error
  # messages do not name the row.
  read = csv.ReadOptions(use_threads=False, block_size=min(max(source.size(), 1), 2**31 - 1))
  header = csv.open_csv(source, read_options=read, parse_options=parse).schema.names
  source.seek(0)
  convert = csv.ConvertOptions(column_types=dict.fromkeys(header, pyarrow.string()))
  return csv.read_csv(source, read_options=read, parse_options=parse, convert_options=convert)


def as_row(data: bytes | dict[str, Any]) -> dict[str, Any]:
  """Returns a row from `RowFile.read` as a dict.

  Values in a row of a table keep their types: dates, bytes and decimals are not converted to text.

  Raises:
    Unusable: The row is not a JSON object.
  """
  return parse_json(data) if isinstance(data, bytes) else data


def parse_json(line: bytes) -> dict[str, Any]:
  """Parses one JSON object, which a byte order mark may precede.

  Raises:
    Unusable: The line is not a JSON object in UTF-8.
  """
  try:
    example = json.loads(line.decode().removeprefix("\ufeff"))
  except UnicodeDecodeError:
    raise Unusable("not UTF-8") from None
  except (ValueError, RecursionError):  # ValueError: also for a number with thousands of digits
    raise Unusable("not JSON") from None
  if not isinstance(example, dict):
    raise Unusable("not a JSON object")
  return example


def read_prompts(path: str, flag: str) -> list[tuple[str, str]]:
  """Returns the place, e.g. "prompts.txt:3", and the text of every prompt of a file or glob.

  Args:
    path: File or glob of text with a prompt per line, or of rows with the field "prompt". Blank
      lines are skipped.
    flag: Name of the option that gave the path, for messages.

  Raises:
    FileNotFoundError: No file matches.
    ValueError: A row or line is not a prompt, or there are no prompts.
  """
  prompts = []
  for file in list_files(path, flag):
    rows = open_rows(file)
    for number, start, end in rows.positions:
      data = rows.read(start, end)
      if isinstance(data, dict) or data.strip():
        place = rows.place(number)
        prompts.append((place, _prompt(data, place, rows.kind)))
  if not prompts:
    raise ValueError(f"{path} holds no prompt")
  return prompts


def _prompt(data: bytes | dict[str, Any], place: str, kind: str) -> str:
  if kind == "text":
    try:
      return data.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"{place}: not UTF-8 text: {error}") from error
  try:
    prompt = as_row(data).get("prompt")
  except Unusable:
    prompt = None
  if not isinstance(prompt, str):
    text = data if isinstance(data, bytes) else json.dumps(data, default=repr).encode()
    given = text[:80].decode(errors="replace")
    raise ValueError(f'{place}: expected {{"prompt": "..."}}, got {given}')
  return prompt
