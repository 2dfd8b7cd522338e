"""Makes a throughput report of pytest-benchmark's JSON: tables in Markdown, plots in PNG.

  python benchmarks/report.py FILE... [--output=REPORT.md] [--plots=FOLDER]

With several files, every one is compared with the first. The plots go into the folder of the
report, or of the first file if the report goes to stdout. Exits with 1 if a file cannot be used.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ABSENT = "–"
# A rate's name in extra_info: its unit, and how many of the counted things are one of it.
RATES = {
  "flops_per_second": ("GFLOP/s", 1e9),
  "bytes_per_second": ("GB/s", 1e9),
  "tokens_per_second": ("tokens/s", 1.0),
}


class ReportError(Exception):
  """A file that no report can be made of, or that cannot be written; says which and why."""


class Row(NamedTuple):
  """One benchmark.

  Attributes:
    name: within its group.
    group: of what is plotted together.
    seconds: the median over the rounds.
    info: its extra_info.
  """

  name: str
  group: str
  seconds: float
  info: dict[str, Any]


class Run(NamedTuple):
  """One file: how to call it, what it was made with, and its rows by their full names."""

  label: str
  origin: str
  rows: dict[str, Row]


def main(arguments: Sequence[str] | None = None) -> int:
  """Reads the files, writes the report; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("files", nargs="+", metavar="FILE", help="written by --benchmark-json")
  parser.add_argument("--output", type=Path, help="the Markdown file; stdout by default")
  parser.add_argument("--plots", type=Path, help="the folder for the plots")
  options = parser.parse_args(arguments)
  folder = options.plots or (options.output or Path(options.files[0])).parent
  try:
    runs = list(map(read, options.files, _labels(options.files)))
    text = markdown(runs)
    written = write_plots(runs, folder)
    if options.output is None:
      print(text)
    else:
      links = "\n".join(f"![{path.stem}]({_link(path, options.output)})" for path in written)
      _write(options.output, f"{text}\n{links}\n")
      written.append(options.output)
  except ReportError as error:
    print(f"report.py: {error}", file=sys.stderr)
    return 1
  print(f"wrote {', '.join(map(str, written))}", file=sys.stderr)
  return 0


def read(path: str, label: str) -> Run:
  """Reads what `pytest --benchmark-json` wrote.

  Args:
    path: the file.
    label: how to call it in the report.

  Raises:
    ReportError: it is not there, not such a file, or has no benchmarks.
  """
  try:
    data = json.loads(Path(path).read_text(encoding="utf-8"))
  except OSError as error:
    raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
  except ValueError as error:  # neither UTF-8 nor JSON
    raise ReportError(f"{path}: is not JSON: {error}") from error
  if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
    raise ReportError(f"{path}: is not a report of pytest-benchmark: no list of benchmarks in it")
  if not data["benchmarks"]:
    raise ReportError(f"{path}: has no benchmarks: none ran, or none passed")
  rows = {}
  for number, entry in enumerate(data["benchmarks"], start=1):
    try:
      name, seconds = entry["name"], entry["stats"]["median"]
      info, group = entry.get("extra_info") or {}, entry.get("group") or "benchmarks"
      numbers = [seconds, *(info[key] for key in (*RATES, "largest_error") if key in info)]
      if not (isinstance(info, dict) and seconds > 0 and all(map(math.isfinite, numbers))):
        raise ValueError
      row = Row(str(name).removeprefix("test_"), str(group), float(seconds), info)
      rows[entry.get("fullname", name)] = row
    except (KeyError, TypeError, ValueError, AttributeError) as error:
      raise ReportError(
        f"{path}: is not a report of pytest-benchmark: benchmark {number} has no name, no "
        "positive median, or other figures than numbers"
      ) from error
  return Run(label, _origin(data, rows), rows)


def markdown(runs: Sequence[Run]) -> str:
  """Returns the report: where the figures come from, and a table per group."""
  parts = ["# Throughput", "\n".join(f"- {run.label}: {run.origin}" for run in runs)]
  if len(runs) > 1:
    parts.append(
      f"Times are medians. A ratio is how many times as fast as in {runs[0].label} the same work "
      "is done; where it is not the same work, there is none."
    )
  for group, names in _groups(runs):
    header, lines = (_figures if len(runs) == 1 else _comparison)(runs, names)
    table = [header, ["---"] * len(header), *lines]
    parts += [f"## {group}", "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in table)]
  return "\n\n".join(parts) + "\n"


def write_plots(runs: Sequence[Run], folder: Path) -> list[Path]:
  """Draws a bar chart per group, of the rate that it names in extra_info.

  Args:
    runs: the files; each has a colour.
    folder: where the charts go; it is made.

  Returns:
    The PNG files.

  Raises:
    ReportError: they cannot be written.
  """
  from matplotlib.figure import Figure  # takes a second, which errors need not wait for

  written = []
  for group, names in _groups(runs):
    rates = (run.rows[name].info.get("rate") for run in runs for name in names if name in run.rows)
    rate = next((str(rate) for rate in rates if rate), "")
    unit, size = RATES.get(rate, ("calls/s", 1.0))
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(names) * len(runs)), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
      places = [p + i * 0.8 / len(runs) for p in range(len(names))]
      heights = [_rate(run.rows.get(name), rate) / size for name in names]
      bars = axes.barh(places, heights, height=0.8 / len(runs), label=run.label)
      axes.bar_label(bars, [_number(h) if h else "" for h in heights], padding=2, fontsize=8)
    middle = 0.4 - 0.4 / len(runs)
    axes.set_yticks([p + middle for p in range(len(names))], [_name(runs, name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(title=group, xlabel=f"{unit}, more is better")
    if len(runs) > 1:
      figure.legend(loc="outside lower center", ncols=len(runs))
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', group.lower()).strip('-')}.png"
    try:
      folder.mkdir(parents=True, exist_ok=True)
      figure.savefig(path, dpi=120)
    except OSError as error:
      raise ReportError(f"{path}: cannot be written: {error.strerror}") from error
    written.append(path)
  return written


def _figures(runs, names) -> tuple[list[str], list[list[str]]]:
  """Returns the table of one file."""
  header = ["case", "shape", "made smaller", "runs", "median"]
  header += [unit for unit, _ in RATES.values()] + ["largest error", "validated at"]
  lines = []
  for row in (runs[0].rows[name] for name in names):
    facts = [row.info.get(key) or "" for key in ("shape", "reduced")]
    rates = [_rate(row, rate) / size for rate, (_, size) in RATES.items()]
    error = row.info.get("largest_error")
    lines.append(
      [row.name, *facts, " ".join(_what(row)), _time(row.seconds)]
      + [_number(rate) if rate else ABSENT for rate in rates]
      + [ABSENT if error is None else f"{error:.1e}", row.info.get("validated", ABSENT)]
    )
  return header, lines


def _comparison(runs, names) -> tuple[list[str], list[list[str]]]:
  """Returns the table of several files: times, ratios to the first, the largest error of all."""
  others = runs[1:]
  header = ["case", "shape", *(run.label for run in runs)]
  header += [f"{run.label} : {runs[0].label}" for run in others] + ["largest error"]
  lines = []
  for name in names:
    rows = [run.rows.get(name) for run in runs]
    shapes = dict.fromkeys(row.info.get("shape", "") for row in rows if row)
    errors = [row.info["largest_error"] for row in rows if row and "largest_error" in row.info]
    lines.append(
      [_name(runs, name), " or ".join(shapes)]
      + [_time(row.seconds) if row else ABSENT for row in rows]
      + [_ratio(rows[0], row) for row in rows[1:]]
      + [f"{max(errors):.1e}" if errors else ABSENT]
    )
  return header, lines


def _ratio(first: Row | None, other: Row | None) -> str:
  if first is None or other is None:
    return ABSENT
  if any(first.info.get(key) != other.info.get(key) for key in ("shape", "dtype")):
    return "other work"
  return f"{first.seconds / other.seconds:.2f}"


def _groups(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
  """Yields each group with the full names in it, in the order of the files."""
  groups: dict[str, dict[str, None]] = {}
  for run in runs:
    for name, row in run.rows.items():
      groups.setdefault(row.group, {})[name] = None
  yield from ((group, list(names)) for group, names in groups.items())


def _origin(data: dict[str, Any], rows: dict[str, Row]) -> str:
  """Says which commit ran when, on what."""
  commit, machine = _part(data, "commit_info"), _part(data, "machine_info")
  changed = " with changes" if commit.get("dirty") else ""
  parts = [f"commit {str(commit['id'])[:10]}{changed}"] if commit.get("id") else []
  parts += [str(data["datetime"])[:16].replace("T", " ")] if data.get("datetime") else []
  parts += [str(cpu)] if (cpu := _part(machine, "cpu").get("brand_raw")) else []
  devices = dict.fromkeys(row.info["device"] for row in rows.values() if "device" in row.info)
  return ", ".join(parts + [f"device {device}" for device in devices]) or "of unknown origin"


def _part(data: dict[str, Any], name: str) -> dict[str, Any]:
  part = data.get(name)
  return part if isinstance(part, dict) else {}


def _labels(paths: Sequence[str]) -> list[str]:
  """Returns file names where they differ, else whole paths; numbered if a file is named twice."""
  labels = [Path(path).stem for path in paths]
  if len(set(labels)) < len(labels):
    labels = list(paths)
  if len(set(labels)) < len(labels):
    labels = [f"{label} ({number})" for number, label in enumerate(labels, start=1)]
  return labels


def _what(row: Row) -> list[str]:
  return [row.info[key] for key in ("implementation", "dtype") if key in row.info]


def _name(runs: Sequence[Run], name: str) -> str:
  return next(run.rows[name].name for run in runs if name in run.rows)


def _rate(row: Row | None, rate: str) -> float:
  """Returns a rate, or 0 where there is none; calls per second if it has no name."""
  if row is None:
    return 0.0
  return row.info.get(rate, 0.0) if rate in RATES else 1.0 / row.seconds


def _time(seconds: float) -> str:
  for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
    if seconds >= size:
      return f"{_number(seconds / size)} {unit}"
  return f"{_number(seconds / 1e-9)} ns"


def _number(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(value: Any) -> str:
  return str(value).replace("|", "\\|").replace("\n", " ")


def _link(path: Path, output: Path) -> str:
  path, folder = path.resolve(), output.resolve().parent
  return path.relative_to(folder, walk_up=True).as_posix()


def _write(path: Path, text: str) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
  except OSError as error:
    raise ReportError(f"{path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
  sys.exit(main())
