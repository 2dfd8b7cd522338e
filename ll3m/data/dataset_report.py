"""What is known of a dataset before training on it, as lines of text."""

import numpy as np

from ll3m.data.dataset_spec import DataSpec
from ll3m.data.epoch_estimate import EpochEstimate
from ll3m.data.examples import Examples, Table
from ll3m.data.row_corpus import RowCorpus
from ll3m.data.scanning import Counts

_MOST_LISTED = 5  # sources


def describe_rows(
  corpus: RowCorpus, spec: DataSpec, estimate: EpochEstimate | None = None
) -> list[tuple[str, str]]:
  """Returns labels and texts: the sources, their shapes, the rows and the tokens.

  Args:
    corpus: The dataset, opened.
    spec: The dataset.
    estimate: Estimate of its tokens; None if they were counted, or are unknown.
  """
  if corpus.rows is None:
    return [("data", f"{corpus.label}, streamed")]
  tables = corpus.rows.tables
  lines = [("data", describe_table(table)) for table in tables[:_MOST_LISTED]]
  if len(tables) > _MOST_LISTED:
    lines.append(("data", f"... and {len(tables) - _MOST_LISTED} more sources"))
  if spec.eval_fraction:
    held_out = sum(map(len, corpus.tables)) - sum(map(len, tables))
    lines.append(("held out", f"{plural(held_out, 'row')} for evaluation"))
  counts = all_counts(corpus.rows)
  if counts is not None:
    lines += describe_counts(counts, corpus.overflow, spec.config.seqio_dataset.length)
  elif estimate is not None:
    lines.append(("tokens", estimate.describe()))
  return lines


def plural(count: int, noun: str) -> str:
  """Returns a number and a noun, as "1 row" or "2,000 rows"."""
  return f"{count:,} {noun}{'' if count == 1 else 's'}"


def describe_table(table: Table) -> str:
  """Returns the name, size and shape of a source."""
  shape = table.shape
  skipped = f" ({table.num_skipped:,} unusable)" if table.num_skipped else ""
  how = "recognised as" if table.is_recognised else "read as"
  return f"{table.name}: {plural(len(table), 'row')}{skipped}, {how} {shape.title}{table.rendering}"


def all_counts(rows: Examples) -> Counts | None:
  """Returns the counts of the rows of the first epoch, or None if they were not counted."""
  found = [table.counts for table in rows.tables]
  if None in found:
    return None
  chosen = [counts.select(numbers) for counts, numbers in zip(found, rows.of_pass(0), strict=True)]
  return Counts(*map(np.concatenate, zip(*(counts.columns for counts in chosen), strict=True)))


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
  if longer or (dropped and overflow != "split"):
    long = f"{plural(longer, 'document')} of more than {length} tokens"
    cut = f"{int(counts.truncated.sum()):,} cut, {dropped:,} dropped (overflow={overflow})"
    what = "continued in other rows" if overflow == "split" else cut
    lines.append(("too long", f"{long}: {what}"))
  return lines
