"""Rows of every kind of file; the oracles are Python's json and csv, pyarrow and `datasets`."""

import csv
import gzip
import io
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ll3m.data.row_files import as_row, is_array, kind_of, open_rows, parse_json, read_prompts
from ll3m.data.skipped_examples import Unusable

BOM = b"\xef\xbb\xbf"
# Characters that some readers treat as the end of a line or file, or that JSON escapes.
TEXT = st.text(st.sampled_from('aé" ,\\\n\r\t\x0b\x0c\x1c\x85\u2028\ufeff[]{}'), max_size=8)
ROWS = [{"prompt": "say\u2028Hello", "n": 1}, {"prompt": 'a "quoted", \x85 one', "n": 2}]


def rows_of(path):
  """Returns the place and the object of every row."""
  rows = open_rows(str(path))
  return [(rows.place(n), as_row(rows.read(a, b))) for n, a, b in rows.positions]


def write_json_lines(rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()


def write_array(rows):
  return json.dumps(rows, ensure_ascii=False).encode()


def write_array_by_line(rows):
  lines = ",\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
  return BOM + f"\r\n[\r\n{lines}\r\n]\r\n".encode()


def write_pretty_array(rows):
  return json.dumps(rows, indent=2).encode()


def write_csv(rows, delimiter=","):
  out = io.StringIO()
  writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
  writer.writeheader()
  writer.writerows(rows)
  return BOM + out.getvalue().encode()


def write_tsv(rows):
  return write_csv(rows, "\t")


def write_parquet(rows):
  import datasets

  out = io.BytesIO()
  datasets.Dataset.from_list(rows).to_parquet(out)
  return out.getvalue()


WRITERS = {
  "jsonl": write_json_lines, "ndjson": lambda rows: BOM + write_json_lines(rows),
  "json": write_array, "JSON": write_array_by_line, "a.json": write_pretty_array,
  "csv": write_csv, "tsv": write_tsv, "parquet": write_parquet,
}  # fmt: skip


@pytest.mark.parametrize("encode", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("ending", WRITERS)
def test_prompts_are_read_from_every_kind_of_file(tmp_path, ending, encode):
  packed = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[encode]
  file = tmp_path / f"prompts.{ending}{packed}"
  file.write_bytes(encode(WRITERS[ending](ROWS)))
  prompts = read_prompts(str(file), "prompt_file")
  assert [text for _, text in prompts] == [row["prompt"] for row in ROWS]
  assert all(place.startswith(str(file)) for place, _ in prompts)


OBJECTS = st.dictionaries(TEXT, TEXT | st.lists(TEXT, max_size=2), max_size=2)


@settings(max_examples=50)
@given(
  rows=st.lists(OBJECTS, max_size=4),
  indent=st.sampled_from([None, 0, 2]),
  ascii_only=st.booleans(),
)
def test_arrays_have_the_rows_of_pythons_reader(tmp_path_factory, rows, indent, ascii_only):
  data = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
  file = tmp_path_factory.getbasetemp() / "array.json"
  file.write_bytes(data.encode())
  found = rows_of(file)
  assert [row for _, row in found] == rows
  # A row begins on the line after the previous row.
  lines = [1 if indent is None else 2]
  for row in rows:
    lines.append(
      lines[-1] + (json.dumps([row], indent=indent).count("\n") - 1 if lines[0] > 1 else 0)
    )
  assert [place for place, _ in found] == [f"{file}:{line}" for line in lines[: len(rows)]]


@given(cells=st.lists(st.lists(TEXT, min_size=2, max_size=2), min_size=1),
       kind=st.sampled_from(["csv", "tsv"]))  # fmt: skip
def test_cells_of_csv_equal_those_of_pythons_reader(tmp_path_factory, cells, kind):
  out, delimiter = io.StringIO(), "," if kind == "csv" else "\t"
  csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["text", "b"], *cells])
  file = tmp_path_factory.getbasetemp() / f"cells.{kind}"
  file.write_bytes(out.getvalue().encode())
  reader = csv.DictReader(io.StringIO(out.getvalue(), newline=""), delimiter=delimiter)
  expected = [(f"{file}, row {n}", row) for n, row in enumerate(reader, start=1)]
  assert rows_of(file) == expected


def test_cells_of_csv_are_not_converted(tmp_path):
  (tmp_path / "a.csv").write_text("text,n\n007,1.50\nNA,null\n,True\n2026-01-02,\n")
  assert [tuple(row.values()) for _, row in rows_of(tmp_path / "a.csv")] == [
    ("007", "1.50"), ("NA", "null"), ("", "True"), ("2026-01-02", ""),
  ]  # fmt: skip


def test_a_cell_of_csv_may_be_a_long_document(tmp_path):
  text = "a line, and more\n" * 200_000
  (tmp_path / "a.csv").write_bytes(write_csv([{"text": "x"}, {"text": text}, {"text": "y"}]))
  assert [row["text"] for _, row in rows_of(tmp_path / "a.csv")] == ["x", text, "y"]


def test_conversations_of_parquet_are_lists_of_objects(tmp_path):
  row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}
  (tmp_path / "a.parquet").write_bytes(write_parquet([row]))
  assert rows_of(tmp_path / "a.parquet") == [(f"{tmp_path}/a.parquet, row 1", row)]


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    (b"one\n\n \t\ntwo \r\n", {1: "one", 4: "two "}),
    (BOM + b"one", {1: "one"}),
    ("a\u2028b\x85c\x0cd\re\r\nf\r".encode(), {1: "a\u2028b\x85c\x0cd\re", 2: "f\r"}),
    (b'{"prompt": "a"}', {1: '{"prompt": "a"}'}),  # text, by its extension
  ],
)
def test_a_line_of_text_is_a_prompt(tmp_path, content, expected):
  file = tmp_path / "p.txt"
  file.write_bytes(content)
  assert read_prompts(str(file), "f") == [(f"{file}:{n}", text) for n, text in expected.items()]


def test_prompts_are_read_from_several_files(tmp_path):
  (tmp_path / "a.txt").write_text("one\n")
  (tmp_path / "b.csv").write_text("prompt\ntwo\n")
  (tmp_path / "c[1].txt").write_text("three")
  found = read_prompts(f"{tmp_path}/*", "f")
  assert found == [(f"{tmp_path}/a.txt:1", "one"), (f"{tmp_path}/b.csv, row 1", "two"),
                   (f"{tmp_path}/c[1].txt:1", "three")]  # fmt: skip
  assert read_prompts(f"{tmp_path}/c[1].txt", "f") == found[2:]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.json", b'[{"a": 1},\n{"a": }]', ":2: not a JSON array: Expecting value"),
    ("a.json", b'[{"a": 1}\n{"a": 2}]', ":2: not a JSON array: Expecting ',' or ']'"),
    ("a.json", b'[{"a": 1},\n]', ":2: not a JSON array: Expecting value"),
    ("a.json", b'[{"a": 1},\n{"a"', ":2: not a JSON array: Expecting ':' delimiter"),
    ("a.json", b'[{"a": 1}]\n\n[{"a": 2}]', ":3: not a JSON array: .*after its end"),
    ("a.json", b'[\n{"a": ' + b"[" * 200_000, ":2: not a JSON array: "),
    ("a.json", b"[{\n" + b'"a": ' + b"1" * 5000 + b"}]", ":1: not a JSON array: Exceeds the limit"),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", " is not a csv file: .*Row #3: Expected 2 columns, got 3"),
    ("a.csv", b"a\n\xff\n", " is not a csv file: .*invalid UTF8"),
    ("a.csv", b"", " is not a csv file: Empty CSV file"),
    ("a.tsv", b"a\ta\n1\t2\n", " .*columns .*'a'"),
    ("a.parquet", b"PAR1 and no more", " is not a parquet file: "),
    ("a.jsonl", '{"a": 1}'.encode("utf-16"), " is UTF-16: convert it with `iconv -f UTF-16 -t UTF"),
    ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), " is UTF-16LE: convert it with `iconv -f UTF-16LE"),
  ],
)  # fmt: skip
def test_damaged_files_are_reported_in_one_line(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=f"^{tmp_path / name}{message}") as caught:
    rows_of(tmp_path / name)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}', ':3: expected {"prompt": "..."}, got {"text"'),
    ("p.json", b'[{"prompt": "a"},\n 3]', ':2: expected {"prompt": "..."}, got 3'),
    ("p.csv", b"prompts\nb\n", ', row 1: expected {"prompt": "..."}, got {"prompts": "b"}'),
    ("p.jsonl", b'{"prompt": "\xff"}', ":1: expected"),
    ("p.txt", b"a\n\xff", ":2: not UTF-8 text: "),
    ("p.txt", b"\r\n \n", " holds no prompt"),
    ("p.json", b"[]", " holds no prompt"),
  ],
)
def test_rows_that_are_not_prompts_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError) as caught:
    read_prompts(str(tmp_path / name), "prompt_file")
  assert str(caught.value).startswith(f"{tmp_path / name}{message}")


def test_a_missing_prompt_file_is_named():
  with pytest.raises(FileNotFoundError, match="^`prompt_file`: no file matches '/nowhere'$"):
    read_prompts("/nowhere", "prompt_file")


@pytest.mark.parametrize(
  ("name", "head", "kind"),
  [
    ("a.txt", b'{"a": 1}', "text"), ("a.TXT.GZ", b"", "text"), ("a.csv.zst", b"", "csv"),
    ("a", b'\n{"a": 1}', "json"), ("a", BOM + b'[\n {"a"', "json"), ("a", b"PAR1", "parquet"),
    ("a", b"a,b", None), ("a.py", b"{x}", None), ("a", b"", None),
  ],
)  # fmt: skip
def test_the_extension_or_else_the_content_determines_the_kind(name, head, kind):
  assert kind_of(name, head) == kind


@pytest.mark.parametrize("head", [b"[{", BOM + b" \r\n[\n\t{", b"[]", b"[ ", b"["])
def test_an_array_of_objects_is_recognised(head):
  assert is_array(head)


@pytest.mark.parametrize("head", [b"", b"{", b"[1]\n", b"[nonsense", b'["a", {"b": 1}]', b"x[{"])
def test_json_lines_are_not_taken_for_an_array(head):
  assert not is_array(head)


@pytest.mark.parametrize(
  ("line", "reason"),
  [(b"{", "not JSON"), (b"[" * 100_000, "not JSON"), (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
   (b"[1]", "not a JSON object"), (b'{"a": "\xff"}', "not UTF-8")],
)  # fmt: skip
def test_lines_that_are_not_objects_are_unusable(line, reason):
  with pytest.raises(Unusable, match=reason):
    parse_json(line)


def test_a_byte_order_mark_is_not_part_of_a_row():
  assert parse_json(BOM + b'{"text": "a"}\r') == {"text": "a"}
