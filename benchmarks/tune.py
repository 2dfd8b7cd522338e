"""Finds the block sizes that cost the fewest cycles, by the TPU compiler's estimates; needs no TPU.

  python -m benchmarks.tune --op=flash_attention --generation=v5e \
      --shape=H=96,T=3072,mask=window --output=mine.json
  LL3M_KERNELS_TABLES=mine.json python train.py

Existing entries of other shapes are kept. An interrupted search resumes when the command is run
again. Run it from the root of the repository; it needs libtpu and tqdm.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # set before jax, which must not look for chips

from benchmarks.tuning.cache import Ledger
from benchmarks.tuning.estimates import CHIPS
from benchmarks.tuning.search import Search
from benchmarks.tuning.search_space import DTYPES, OPERATIONS, Operation, Shape
from ll3m_kernels import block_tables
from ll3m_kernels.attention.api import MAX_HEAD_DIM


def main(argv: list[str] | None = None) -> int:
  """Tunes the shapes on the command line.

  Returns:
    The exit code.
  """
  options = _parser().parse_args(argv)
  operation, output = OPERATIONS[options.op], options.output
  try:
    shapes = [_shape(text, operation) for text in options.shape] or list(operation.shapes)
    entries = block_tables.read(output) if output.exists() else {}
  except ValueError as error:
    print(f"tune: {error}", file=sys.stderr)
    return 2
  try:
    from tqdm import tqdm
  except ImportError:
    print("tune: tqdm and libtpu are required: pip install libtpu tqdm", file=sys.stderr)
    return 1
  failed = 0
  print(f"estimates are saved in {options.estimates}, results in {output}", file=sys.stderr)
  with tqdm(unit="estimate") as bar:
    search = Search(
      Ledger(options.estimates), workers=options.workers, seconds=options.seconds, report=bar.update
    )
    for number, shape in enumerate(shapes, start=1):
      bar.set_description(f"shape {number} of {len(shapes)}")
      try:
        found = search.run(options.op, options.generation, shape)
      except RuntimeError as error:
        bar.write(f"tune: {error}", file=sys.stderr)
        failed += 1
        continue
      for failure in found.failures:
        bar.write(f"tune: not priced: {failure}", file=sys.stderr)
      entries[found.key] = {"limits": found.limits, "cycles": found.cycles}
      block_tables.write(output, entries)
      gains = ", ".join(
        f"{kernel} {c['tuned']:,} cycles ({c['tuned'] / c['rule']:.3f} of the rule's)"
        for kernel, c in found.cycles.items()
      )
      bar.write(f"{options.op} {_text(shape)}: {found.limits}: {gains}")
  return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.tune",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--op", required=True, choices=OPERATIONS, help="operation to tune")
  parser.add_argument("--generation", required=True, choices=CHIPS, help="TPU generation")
  parser.add_argument(
    "--shape",
    action="append",
    default=[],
    help="shape to tune: H=128,T=4096,mask=causal,dtype=bfloat16 for attention, D=4096,T=8192 for "
    "norms; may be repeated; by default the shapes of LL3M's models",
  )
  parser.add_argument("--output", type=Path, required=True, help="table to write")
  parser.add_argument(
    "--estimates",
    type=Path,
    default=Path("runs/tune/estimates.jsonl"),
    help="cache of estimates, so that none is made twice (default: %(default)s)",
  )
  parser.add_argument("--workers", type=_positive, default=2, help="parallel compilations")
  parser.add_argument("--seconds", type=float, default=600.0, help="time limit of each estimate")
  return parser


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
  return value


def _shape(text: str, operation: Operation) -> Shape:
  """Parses a shape such as H=128,T=4096,mask=causal.

  Raises:
    ValueError: The text is not a shape of the operation.
  """
  size = "H" if len(operation.masks) > 1 else "D"
  given = {"T": "4096", "dtype": "bfloat16"}
  if size == "H":
    given["mask"] = "causal"
  for part in text.split(","):
    name, _, value = part.partition("=")
    if name not in {size, *given} or not value:
      raise ValueError(
        f"--shape={text}: {part!r} is none of {size}=, {', '.join(f'{n}=' for n in given)}"
      )
    given[name] = value
  if size not in given:
    raise ValueError(f"--shape={text}: {size}= is missing")
  for name in (size, "T"):
    if not given[name].isdigit() or not int(given[name]):
      raise ValueError(f"--shape={text}: {name} must be a positive number, got {given[name]!r}")
  for name, allowed in (("dtype", DTYPES), ("mask", operation.masks)):
    if given.get(name, "") not in allowed:
      raise ValueError(
        f"--shape={text}: {name} must be one of {', '.join(allowed)}, got {given[name]!r}"
      )
  if size == "H" and int(given["H"]) > MAX_HEAD_DIM:
    raise ValueError(f"--shape={text}: H must be at most {MAX_HEAD_DIM}, got {given['H']}")
  return Shape(int(given[size]), int(given["T"]), given.get("mask", ""), given["dtype"])


def _text(shape: Shape) -> str:
  return " ".join(str(field) for field in shape if field)


if __name__ == "__main__":
  sys.exit(main())
