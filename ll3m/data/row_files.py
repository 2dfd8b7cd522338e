"""Files of rows, which are objects with fields: JSON, CSV, TSV, parquet, Arrow and plain text.

This module does not import TensorFlow, because commands that only read prompts do not need it.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ll3m.data.shard_files import list_files
from ll3m.data.skipped_examples import Unusable
from ll3m.data.text_files import (
  COMPRESSIONS,
  HEAD,
  decode_text,
  read_bytes,
  require_utf8,
  split_lines,
  split_text,
)

# Kinds of files, by the extension before any .gz or .zst.
KINDS = {
  ".jsonl": "json", ".json": "json", ".ndjson": "json",
  ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow",
  ".txt": "text", ".text": "text", ".md": "text", ".rst": "text",
}  # fmt: skip

TABLES = ("csv", "tsv", "parquet", "arrow", "dataset")
_PARQUET, _ARROW = b"PAR1", b"ARROW1"
_CHUNK = 1000  # rows of a table that are converted to Python together
_SPACE = re.compile(r"[ \t\r\n]*")
# The beginning of an array of objects. A line of JSON Lines may be an array, but of other values.
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*(?:[{\]]|$)")
# The beginning of indented objects, one after another: a first line with nothing but a brace.
_INDENTED = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\{[ \t]*\r?\n")


class RowFile(NamedTuple):
  """The rows or lines of one file, each of which can be read by its position.

  Attributes:
    file: Name of the file.
    kind: One of the values of `KINDS`, "line" for plain text whose rows are lines, or "dataset" for
      a dataset of the `datasets` library.
    positions: Number (of the line, or of the row in a table), start and end of each row. It can be
      iterated once.
    read: Function from a start and an end to the row: the bytes of a line, of a JSON object or of
      plain text, or the row of a table.
    in_bulk: Function that reads all rows in order, faster than one after another; None if there is
      none.
  """

  file: str
  kind: str
  positions: Iterable[tuple[int, int, int]]
  read: Callable[[int, int], bytes | dict[str, Any]]
  in_bulk: Callable[[], Iterator[dict[str, Any]]] | None = None

  def row(self, data: bytes | dict[str, Any]) -> dict[str, Any]:
    """Returns what `read` returned as a row; plain text is in the column `text`.

    Raises:
      Unusable: It is not a row.
    """
    return to_row(self.kind, data)

  def scan(self) -> Iterator[tuple[int, int, int, bytes | dict[str, Any]]]:
    """Yields the number, start and end of every row, and the row as `read` returns it."""
    if self.in_bulk is None:
      for number, start, end in self.positions:
        yield number, start, end, self.read(start, end)
    else:
      for position, row in zip(self.positions, self.in_bulk(), strict=True):
        yield *position, row

  def place(self, number: int) -> str:
    """Returns the name of a row or line in messages, given its number."""
    is_table = self.kind in TABLES
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
  if head.startswith(_ARROW):
    return "arrow"
  return "json" if re.match(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*["}]', head) else None


def is_array(head: bytes) -> bool:
  """Returns whether JSON begins as an array of objects rather than as JSON Lines."""
  return _ARRAY.match(head) is not None


def open_rows(file: str, *, plain_text: str = "line") -> RowFile:
  """Opens a file of any kind.

  Args:
    file: Name of the file.
    plain_text: Unit of plain text that is a row; see `text_files.split_text`.

  Raises:
    ValueError: The file is damaged, or is UTF-16 or UTF-32 instead of UTF-8.
  """
  data = read_bytes(file)
  head = data[:HEAD]
  kind = kind_of(file, head) or "text"
  if kind in ("parquet", "arrow"):
    return _table(file, kind, _parquet if kind == "parquet" else _arrow, data)
  require_utf8(file, data)
  if kind in ("csv", "tsv"):
    return _table(file, kind, _csv, data)
  if kind == "text":
    positions = split_text(data, plain_text)
    kind = "line" if plain_text == "line" else "text"
  elif is_array(head) or _INDENTED.match(head):
    positions = _values(file, data, is_array=is_array(head))
  else:
    positions = split_lines(data)
  return RowFile(file, kind, positions, lambda start, end: data[start:end])


def _values(
  file: str, data: bytes | mmap.mmap, *, is_array: bool
) -> Iterator[tuple[int, int, int]]:
  """Yields the line, start and end of every element of a JSON array, or of consecutive objects.

  The file is decoded as Latin-1, where each character is one byte. JSON's own characters are the
  same as in UTF-8.

  Raises:
    ValueError: The array ends early or the JSON is malformed; values cannot be separated from there
      on.
  """
  text = str(data, "latin-1")
  decode = json.JSONDecoder().raw_decode
  what = "a JSON array" if is_array else "JSON"

  def skip(start: int) -> int:
    return _SPACE.match(text, start).end()

  def at_end(place: int) -> bool:
    return text[place : place + 1] == ("]" if is_array else "")

  at = skip(text.index("[") + 1) if is_array else text.index("{")
  line, closed = 1 + text.count("\n", 0, at), at_end(at)
  while not closed:
    try:
      _, end = decode(text, at)
      after = skip(end)
      closed = at_end(after)
      if is_array and not closed and text[after : after + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
    except json.JSONDecodeError as error:
      raise ValueError(f"{file}:{error.lineno}: not {what}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
      raise ValueError(f"{file}:{line}: not {what}: {error}") from error
    yield line, at, end
    following = after if closed or not is_array else skip(after + 1)
    line += text.count("\n", at, following)
    at = following
  end = skip(at + 1) if is_array else len(text)
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
  return dataset_rows(file, kind, datasets.Dataset(table))


def dataset_rows(file: str, kind: str, rows: Any) -> RowFile:
  """Returns the rows of a `datasets.Dataset`."""

  def in_bulk() -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), _CHUNK):
      columns = rows[start : start + _CHUNK]
      names = list(columns)
      for values in zip(*columns.values(), strict=True):
        yield dict(zip(names, values, strict=True))

  return RowFile(
    file,
    kind,
    ((row + 1, row, row + 1) for row in range(len(rows))),
    lambda start, _: rows[start],
    in_bulk,
  )


def _parquet(_: str, source: Any) -> Any:
  from pyarrow import parquet

  return parquet.read_table(source)


def _arrow(_: str, source: Any) -> Any:
  """Reads Arrow's file format or its stream format, which `datasets` writes."""
  import pyarrow

  is_file = source.read(len(_ARROW)) == _ARROW
  source.seek(0)
  return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).read_all()


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


def to_row(kind: str, data: bytes | dict[str, Any]) -> dict[str, Any]:
  """Returns a row of a file of this kind, which `RowFile.read` returned; see `RowFile.row`."""
  if kind not in ("text", "line"):
    return as_row(data)
  try:
    return {"text": data.decode() if kind == "line" else decode_text(data)}
  except UnicodeDecodeError:
    raise Unusable("not UTF-8") from None


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
  if kind == "line":
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
