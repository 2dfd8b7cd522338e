"""The throughput report: its figures and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


def entry(name="test_causal[tiny]", group="attention", median=2e-3, **info):
  info = {
    "device": "cpu",
    "implementation": "xla",
    "dtype": "float32",
    "shape": "T=8 N=2",
    "reduced": "T 16 -> 8",
    "validated": "T=4, interpreted",
    "largest_error": 3e-7,
    "rate": "flops_per_second",
    "flops_per_second": 5e9 / median,
    "bytes_per_second": 4e6 / median,
    "tokens_per_second": 8 / median,
  } | info
  return {
    "name": name,
    "fullname": f"benchmarks/bench_a.py::{name}",
    "group": group,
    "stats": {"median": median},
    "extra_info": info,
  }


@pytest.fixture
def write(tmp_path):
  """Returns a function that writes a report like pytest-benchmark's and returns its path."""

  def write(name, *entries, commit="0123456789abcdef"):
    path = tmp_path / name
    path.write_text(
      json.dumps({"benchmarks": entries, "commit_info": {"id": commit, "dirty": True}})
    )
    return str(path)

  return write


def table(text, group):
  """Returns the rows of a group's table, as dictionaries by column."""
  lines = text.split(f"## {group}\n\n")[1].split("\n\n")[0].splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_a_file_becomes_a_table_per_group(write, capsys):
  path = write("a.json", entry(), entry("test_norm[tiny]", "norms", 3e-6, largest_error=0.0))
  assert report.main([path]) == 0
  text = capsys.readouterr().out
  assert "commit 0123456789 with changes, device cpu" in text
  assert table(text, "attention") == [
    {
      "case": "causal[tiny]",
      "shape": "T=8 N=2",
      "made smaller": "T 16 -> 8",
      "runs": "xla float32",
      "median": "2 ms",
      "GFLOP/s": "2,500",
      "GB/s": "2",
      "tokens/s": "4,000",
      "largest error": "3.0e-07",
      "validated at": "T=4, interpreted",
    }
  ]
  (row,) = table(text, "norms")
  assert (row["median"], row["largest error"]) == ("3 us", "0.0e+00")


def test_benchmarks_without_our_extra_info_are_reported_too(write, capsys):
  plain = {"name": "test_a", "fullname": "x.py::test_a", "group": None, "stats": {"median": 4e-9}}
  path = write("a.json", plain, commit=None)
  assert report.main([path]) == 0
  (row,) = table(capsys.readouterr().out, "benchmarks")
  assert (row["median"], row["tokens/s"], row["largest error"]) == ("4 ns", "–", "–")


BAD = {
  "not JSON": "[1",
  "not UTF-8": b"\xff\xfe",
  "a list": "[]",
  "something else": '{"results": []}',
  "no list": '{"benchmarks": 3}',
  "no benchmarks": '{"benchmarks": []}',
  "no stats": '{"benchmarks": [{"name": "a"}]}',
  "not an entry": '{"benchmarks": [7]}',
  "no time": '{"benchmarks": [{"name": "a", "stats": {"median": null}}]}',
  "a time of NaN": '{"benchmarks": [{"name": "a", "stats": {"median": NaN}}]}',
  "a rate of text": (
    '{"benchmarks": [{"name": "a", "stats": {"median": 1},'
    ' "extra_info": {"flops_per_second": "many"}}]}'
  ),
  "info is a list": '{"benchmarks": [{"name": "a", "stats": {"median": 1}, "extra_info": [1]}]}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_errors_name_the_bad_file(content, tmp_path, capsys):
  bad = tmp_path / "bad.json"
  bad.write_bytes(content if isinstance(content, bytes) else content.encode())
  assert report.main([str(bad)]) == 1
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith(f"report.py: {bad}: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", [["benchmarks/report.py"], ["-m", "benchmarks.report"]])
def test_a_missing_file_ends_the_command_without_a_traceback(command, tmp_path):
  missing = tmp_path / "missing.json"
  result = subprocess.run(
    [sys.executable, *command, str(missing)], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert result.returncode == 1
  assert result.stderr == f"report.py: {missing}: cannot be read: No such file or directory\n"
