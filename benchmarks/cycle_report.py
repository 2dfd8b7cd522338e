"""The report of estimated cycles: checks of the estimates, the table, the file and the charts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cycle_rows import Pass, Row
from benchmarks.tuning.estimates import CHIPS, Chip, Kernel

NOT_PRICED, NOT_COMPARABLE = "not priced", "not comparable"

# The estimates of a function's kernels, or why there are none.
Result = list[Kernel] | str


class Price(NamedTuple):
  """The cycles of one pass, or why there are none.

  Attributes:
    estimate: Cycles by the compiler's simulation; None if there is no valid estimate.
    cycles: Maximum of the estimate and the cycles that HBM alone needs; None likewise.
    problem: "not priced" without an estimate, "not comparable" if it is not valid, else empty.
    reason: Reason for the problem.
  """

  estimate: int | None = None
  cycles: float | None = None
  problem: str = ""
  reason: str = ""


class Figure(NamedTuple):
  """A row of the table.

  Attributes:
    group: Heading of the table that contains the row.
    name: Name of the shape.
    pass_name: Name of the pass.
    generation: TPU generation.
    ours: Price of our own kernels.
    roofline: Minimum cycles, by FLOPs or by bytes.
    is_memory_bound: Whether bytes determine the roofline.
    share: Share of the roofline that is reached: the share of peak FLOPs if FLOPs determine it.
    peers: Prices of the peers, by name.
  """

  group: str
  name: str
  pass_name: str
  generation: str
  ours: Price
  roofline: float
  is_memory_bound: bool
  share: float
  peers: dict[str, Price]


def figures_of(
  generation: str, row: Row, ours: Result, peers: Mapping[tuple[str, str], Sequence[Result]]
) -> Iterator[Figure]:
  """Checks the estimates of a row.

  Args:
    generation: TPU generation.
    row: Priced row, adapted to the generation.
    ours: Result for our kernels.
    peers: Results by pass and peer, one for each block size that was tried.

  Yields:
    One figure per pass.
  """
  chip = CHIPS[generation]
  for part in row.passes:
    by_flops, by_bytes = part.flops / chip.flops, part.hbm_bytes / chip.hbm_bytes
    price = judge(chip, part, [ours], part.kernels, 1)
    yield Figure(
      row.group,
      row.name,
      part.name,
      generation,
      price,
      max(by_flops, by_bytes),
      by_bytes > by_flops,
      max(by_flops, by_bytes) / price.cycles if price.cycles else 0.0,
      {
        peer.name: judge(chip, part, peers[part.name, peer.name], peer.kernels, peer.times)
        for peer in part.peers
      },
    )


def judge(chip: Chip, part: Pass, tried: Sequence[Result], kernels: slice, times: int) -> Price:
  """Takes the best estimate of each kernel and checks that they can be compared.

  Args:
    chip: Chip of the generation.
    part: Pass, whose work the estimates must account for.
    tried: Results, one for each block size that was tried.
    kernels: Slice of the kernels that do the work.
    times: Number of times that they must run to do all of the work.
  """
  priced = [result[kernels] for result in tried if not isinstance(result, str)]
  if not priced:
    return Price(problem=NOT_PRICED, reason=next(r for r in tried if isinstance(r, str)))
  if not priced[0]:
    return Price(problem=NOT_PRICED, reason="there is no kernel in the program")
  best = [min(column, key=lambda kernel: kernel.cycles) for column in zip(*priced, strict=True)]
  if any(kernel.follows_data for kernel in best):
    return Price(problem=NOT_COMPARABLE, reason="data decide what it runs or fetches")
  if part.flops and times * sum(kernel.product_flops or 0 for kernel in best) < part.flops:
    return Price(problem=NOT_COMPARABLE, reason="fewer products were simulated than it needs")
  estimate = times * sum(kernel.cycles for kernel in best)
  if estimate < part.flops / chip.flops:
    return Price(
      problem=NOT_COMPARABLE, reason=f"{estimate:,} cycles are fewer than the peak allows"
    )
  return Price(estimate, max(estimate, part.hbm_bytes / chip.hbm_bytes))


def write(figures: Sequence[Figure], folder: Path) -> str:
  """Writes cycles.md, cycles.json and a chart per generation.

  Returns:
    The content of cycles.md.
  """
  folder.mkdir(parents=True, exist_ok=True)
  text = markdown(figures)
  (folder / "cycles.md").write_text(text, encoding="utf-8")
  rows = [
    figure._asdict()
    | {
      "ours": figure.ours._asdict(),
      "peers": {name: price._asdict() for name, price in figure.peers.items()},
    }
    for figure in figures
  ]
  (folder / "cycles.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
  for generation in dict.fromkeys(figure.generation for figure in figures):
    _draw([f for f in figures if f.generation == generation], folder / f"cycles-{generation}.png")
  return text


def markdown(figures: Sequence[Figure]) -> str:
  """Returns a Markdown table per group."""
  parts = ["# Estimated cycles"]
  for group in dict.fromkeys(figure.group for figure in figures):
    chosen = [figure for figure in figures if figure.group == group]
    peers = list(dict.fromkeys(name for figure in chosen for name in figure.peers))
    is_memory_bound = all(figure.is_memory_bound for figure in chosen)
    header = ["shape", "pass", "TPU", "cycles"]
    header += ["by HBM alone"] if is_memory_bound else ["of peak"]
    compared = [f"ours : {peer}" if is_memory_bound else f"{peer} : ours" for peer in peers]
    lines = ["| " + " | ".join(header + compared) + " |"]
    lines.append("|" + "---|" * (len(header) + len(peers)))
    for figure in chosen:
      cells = [figure.name, figure.pass_name, figure.generation]
      if figure.ours.estimate is None:
        cells += [f"{figure.ours.problem}: {figure.ours.reason}", ""]
      else:
        bound = f"{figure.roofline:,.0f}" if is_memory_bound else f"{figure.share:.1%}"
        cells += [f"{figure.ours.estimate:,}", bound]
      cells += [_ratio(figure, figure.peers.get(peer)) for peer in peers]
      lines.append("| " + " | ".join(cells) + " |")
    parts += [f"## {group}", "\n".join(lines)]
  problems = {
    f"- {figure.name}, {figure.pass_name}, {figure.generation}, {name}: {price.reason}"
    for figure in figures
    for name, price in figure.peers.items()
    if price.problem
  }
  if problems:
    parts += ["## Peers without a figure", "\n".join(sorted(problems))]
  return "\n\n".join(parts) + "\n"


def _ratio(figure: Figure, peer: Price | None) -> str:
  """Returns a peer's cycles over ours; if HBM is the bound, ours over those of the copy."""
  if peer is None:
    return ""
  if peer.problem:
    return peer.problem
  if figure.ours.estimate is None:
    return ""
  if figure.is_memory_bound:
    bounded = figure.ours.cycles / peer.cycles
    return f"{bounded:.2f} ({figure.ours.estimate / peer.estimate:.2f} without HBM's bound)"
  return f"{peer.estimate / figure.ours.estimate:.2f}"


def _draw(figures: Sequence[Figure], path: Path) -> None:
  """Draws the share of the roofline of each figure and of its peers."""
  from matplotlib.figure import Figure as Canvas  # slow to import

  bars = []
  for figure in figures:
    label = f"{figure.name}, {figure.pass_name}"
    bars.append((label, "ours", figure.share))
    bars += [
      (f"{label}: {name}", name, figure.roofline / price.cycles)
      for name, price in figure.peers.items()
      if price.cycles
    ]
  names = list(dict.fromkeys(name for _, name, _ in bars))
  canvas = Canvas(figsize=(10, 1.5 + 0.22 * len(bars)), layout="constrained")
  axes = canvas.subplots()
  for i, name in enumerate(names):
    places = [p for p, bar in enumerate(bars) if bar[1] == name]
    drawn = axes.barh(places, [bars[p][2] for p in places], color=f"C{i}", label=name)
    axes.bar_label(drawn, [f"{bars[p][2]:.0%}" for p in places], padding=2, fontsize=7)
  axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
  axes.invert_yaxis()
  axes.margins(x=0.1, y=0.01)
  axes.set(
    title=f"{figures[0].generation}: estimated share of the roofline", xlabel="more is better"
  )
  canvas.legend(loc="outside lower center", ncols=len(names))
  canvas.savefig(path, dpi=100)
