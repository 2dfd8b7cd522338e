"""What is known of a dataset before training on it, as lines of text."""

import numpy as np

from ll3m.data.dataset_spec import DataSpec
from ll3m.data.examples import Examples, Table
from ll3m.data.row_corpus import RowCorpus
from ll3m.data.scanning import Counts

_MOST_LISTED = 5  # sources


def describe_rows(corpus: RowCorpus, spec: DataSpec) -> list[tuple[str, str]]:
  """Returns labels and texts: the sources, their shapes, the rows and, if counted, the tokens."""
  if corpus.rows is None:
    return [("data", f"{corpus.label}, streamed")]
  tables = corpus.rows.tables
  lines = [("data", describe_table(table)) for table in tables[:_MOST_LISTED]]
  if len(tables) > _MOST_LISTED:
    lines.append(("data", f"... and {len(tables) - _MOST_LISTED} more sources"))
  if spec.eval_fraction:
    part = "held out for evaluation" if spec.is_evaluation else "without those held out"
    lines.append(("rows", f"{len(corpus.rows):,}, {part}"))
  counts = all_counts(corpus.rows)
  if counts is not None:
    lines += describe_counts(counts, corpus.overflow, spec.config.seqio_dataset.length)
  return lines


def describe_table(table: Table) -> str:
  """Returns the name, size and shape of a source."""
  shape = table.shape
  skipped = f" ({table.num_skipped:,} unusable)" if table.num_skipped else ""
  how = "recognised as" if table.is_recognised else "read as"
  return f"{table.name}: {len(table):,} rows{skipped}, {how} {shape.title}{table.rendering}"


def all_counts(rows: Examples) -> Counts | None:
  """Returns the counts of all tables together, or None if they were not counted."""
  found = [table.counts for table in rows.tables]
  if None in found:
    return None
  return Counts(*map(np.concatenate, zip(*(counts.columns for counts in found), strict=True)))


def describe_counts(counts: Counts, overflow: str, length: int) -> list[tuple[str, str]]:
  """Returns lines about the tokens of all rows and about documents that are longer than a row."""
  kept, trained = int(counts.kept.sum()), int(counts.trained.sum())
  used = max(1, int((counts.kept > 0).sum()))
  lines = [
    (
      "tokens",
      f"{kept:,} per epoch, {trained / max(1, kept):.0%} of them trained; {kept / used:,.0f} per "
      f"document, at most {counts.tokens.max():,}",
    )
  ]
  longer = int((counts.tokens > length).sum())
  dropped = int((counts.kept == 0).sum())
  if overflow == "split":
    if longer:
      lines.append(
        ("longer", f"{longer:,} documents than {length} tokens, continued in other rows")
      )
  elif longer or dropped:
    lines.append(
      ("longer", f"{longer:,} documents than {length} tokens: {int(counts.truncated.sum()):,} cut, "
       f"{dropped:,} dropped (overflow={overflow})")
    )  # fmt: skip
  return lines
