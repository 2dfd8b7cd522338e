"""Prints the rates in pytest-benchmark's JSON as tables in Markdown.

  python benchmarks/report.py FILE

pytest-benchmark itself prints times and compares runs (--benchmark-compare). The rates, shapes and
validated errors of the benchmarks are only in its JSON. Exits with code 1 if the file is invalid.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ABSENT = "–"
# The name of each rate in extra_info, with its unit and the value of one unit.
RATES = {
  "flops_per_second": ("GFLOP/s", 1e9),
  "bytes_per_second": ("GB/s", 1e9),
  "tokens_per_second": ("tokens/s", 1.0),
}


class ReportError(Exception):
  """An invalid input file; the message names the file and the reason."""


class Row(NamedTuple):
  """One benchmark.

  Attributes:
    name: Name within its group.
    group: Name of its group.
    seconds: Median over the rounds.
    info: Its extra_info.
  """

  name: str
  group: str
  seconds: float
  info: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
  """Reads the file and prints the report; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("file", metavar="FILE", help="written by --benchmark-json")
  try:
    print(markdown(parser.parse_args(arguments).file), end="")
  except ReportError as error:
    print(f"report.py: {error}", file=sys.stderr)
    return 1
  return 0


def markdown(path: str) -> str:
  """Returns the report: the origin of the figures, and a table per group.

  Args:
    path: File that `pytest --benchmark-json` wrote.

  Raises:
    ReportError: The file is missing, is not a report of pytest-benchmark, or has no benchmarks.
  """
  try:
    data = json.loads(Path(path).read_text(encoding="utf-8"))
  except OSError as error:
    raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
  except ValueError as error:  # neither UTF-8 nor JSON
    raise ReportError(f"{path}: not JSON: {error}") from error
  if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
    raise ReportError(f"{path}: not a report of pytest-benchmark: it has no list of benchmarks")
  if not data["benchmarks"]:
    raise ReportError(f"{path}: no benchmarks: none ran, or none passed")
  groups: dict[str, list[Row]] = {}
  for number, entry in enumerate(data["benchmarks"], start=1):
    try:
      row = _row(entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise ReportError(
        f"{path}: not a report of pytest-benchmark: benchmark {number} has no name, no positive "
        "median, or figures that are not finite numbers"
      ) from error
    groups.setdefault(row.group, []).append(row)
  parts = ["# Throughput", _origin(data, [row for rows in groups.values() for row in rows])]
  header = ["case", "shape", "made smaller", "runs", "median"]
  header += [unit for unit, _ in RATES.values()] + ["largest error", "validated at"]
  for group, rows in groups.items():
    lines = [header, ["---"] * len(header), *map(_cells, rows)]
    parts += [f"## {group}", "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)]
  return "\n\n".join(parts) + "\n"


def _row(entry: dict[str, Any]) -> Row:
  name, seconds = entry["name"], entry["stats"]["median"]
  info, group = entry.get("extra_info") or {}, entry.get("group") or "benchmarks"
  numbers = [seconds, *(info[key] for key in (*RATES, "largest_error") if key in info)]
  if not (isinstance(info, dict) and seconds > 0 and all(map(math.isfinite, numbers))):
    raise ValueError
  return Row(str(name).removeprefix("test_"), str(group), float(seconds), info)


def _cells(row: Row) -> list[str]:
  facts = [row.info.get(key) or "" for key in ("shape", "reduced")]
  runs = " ".join(row.info[key] for key in ("implementation", "dtype") if key in row.info)
  rates = [row.info.get(rate, 0.0) / size for rate, (_, size) in RATES.items()]
  error = row.info.get("largest_error")
  return [
    *(row.name, *facts, runs, _time(row.seconds)),
    *(_number(rate) if rate else ABSENT for rate in rates),
    *(ABSENT if error is None else f"{error:.1e}", row.info.get("validated", ABSENT)),
  ]


def _origin(data: dict[str, Any], rows: Sequence[Row]) -> str:
  """Describes the commit, the time and the machine of a run."""
  commit, machine = _part(data, "commit_info"), _part(data, "machine_info")
  changed = " with changes" if commit.get("dirty") else ""
  parts = [f"commit {str(commit['id'])[:10]}{changed}"] if commit.get("id") else []
  parts += [str(data["datetime"])[:16].replace("T", " ")] if data.get("datetime") else []
  parts += [str(cpu)] if (cpu := _part(machine, "cpu").get("brand_raw")) else []
  devices = dict.fromkeys(row.info["device"] for row in rows if "device" in row.info)
  return ", ".join(parts + [f"device {device}" for device in devices]) or "unknown origin"


def _part(data: dict[str, Any], name: str) -> dict[str, Any]:
  part = data.get(name)
  return part if isinstance(part, dict) else {}


def _time(seconds: float) -> str:
  for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
    if seconds >= size:
      return f"{_number(seconds / size)} {unit}"
  return f"{_number(seconds / 1e-9)} ns"


def _number(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(value: Any) -> str:
  return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
  sys.exit(main())
