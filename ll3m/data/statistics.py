"""Statistics of a dataset of rows: lengths, trained tokens, duplicates and what is unusable."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int64

from ll3m.core.progress import aligned
from ll3m.data.dataset_report import all_counts, describe_counts, describe_table, plural
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.epochs import count_batches
from ll3m.data.row_corpus import RowCorpus
from ll3m.data.skipped_examples import Unusable
from ll3m.data.tokenizer import Tokenizer

_BARS, _WIDTH = 12, 40  # of the histogram in a terminal
_NAMED = 10  # characters, columns and reasons


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Statistics of a dataset; see `to_json` for their names.

  Attributes:
    sources: Name, number of rows, shape and columns of each source.
    rows: Number of usable rows.
    unusable: Number of unusable rows by reason, and the first of them.
    tokens: Number of tokens of each document, before anything is cut off, without empty ones.
    percentiles: 50th and 95th percentile, and the largest number of tokens.
    tokens_per_epoch: Number of tokens that are left.
    trained_per_epoch: Number of these that are trained.
    longer: Number of documents that are longer than a row.
    cut: Number of documents that are cut off.
    dropped: Number of documents that are dropped, or have no token to train on.
    overflow: What happens to documents that are longer than a row.
    length: T, the number of tokens in a row.
    duplicates: Number of documents that equal an earlier one.
    unknown: Number of documents with characters that the tokenizer does not have, and the first
      such characters.
    batch_size: B, the number of rows in a batch.
    batches_per_epoch: Number of batches in an epoch.
  """

  sources: list[dict[str, Any]]
  rows: int
  unusable: dict[str, Any]
  tokens: Int64[np.ndarray, "n"]
  percentiles: dict[str, int]
  tokens_per_epoch: int
  trained_per_epoch: int
  longer: int
  cut: int
  dropped: int
  overflow: str
  length: int
  duplicates: int
  unknown: dict[str, Any]
  batch_size: int
  batches_per_epoch: int

  def to_json(self) -> dict[str, Any]:
    """Returns everything but the tokens of single documents, in a form that JSON can represent."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != "tokens"
    }


def measure(corpus: RowCorpus, spec: DataSpec, tokenizer: Tokenizer) -> Statistics:
  """Measures a dataset whose tokens were counted, and whose stream has one pass."""
  counts, length = all_counts(corpus.rows), spec.config.seqio_dataset.length
  used = counts.tokens[counts.tokens > 0]
  _, occurrences = np.unique(counts.digests[counts.tokens > 0], return_counts=True)
  return Statistics(
    sources=[
      {
        "name": table.name,
        "rows": len(table),
        "unusable": table.num_skipped,
        "data_format": table.shape.name,
        "columns": list(table.row(0)),
        "description": describe_table(table),
      }
      for table in corpus.rows.tables
    ],
    rows=len(corpus.rows),
    unusable={
      "reasons": dict(corpus.skipped.counts.most_common()),
      "first": list(corpus.skipped.first),
    },
    tokens=used,
    percentiles={
      name: int(np.percentile(used, p, method="inverted_cdf")) if len(used) else 0
      for name, p in (("p50", 50), ("p95", 95), ("max", 100))
    },
    tokens_per_epoch=int(counts.kept.sum()),
    trained_per_epoch=int(counts.trained.sum()),
    longer=int((counts.tokens > length).sum()),
    cut=int(counts.truncated.sum()),
    dropped=int((counts.kept == 0).sum()),
    overflow=corpus.overflow,
    length=length,
    duplicates=int((occurrences - 1).sum()),
    unknown=_find_unknown(corpus, tokenizer),
    batch_size=spec.config.seqio_dataset.batch_size,
    batches_per_epoch=count_batches(corpus, spec, range(1)),
  )


def _find_unknown(corpus: RowCorpus, tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns how many documents have unknown characters, and the first of the characters."""
  documents, characters = 0, {}
  for table in corpus.rows.tables:
    rows = np.flatnonzero(table.counts.unknown)
    documents += len(rows)
    for row in rows[:_NAMED].tolist():
      characters |= dict.fromkeys(sorted(tokenizer.unknown_characters(table.text(row))))
  return {"documents": documents, "characters": list(characters)[:_NAMED]}


def describe(found: Statistics, corpus: RowCorpus) -> str:
  """Returns the statistics as text for a terminal of 80 columns, with a histogram."""
  lines = []
  for source in found.sources:
    columns = source["columns"]
    more = f", ... ({len(columns)} in all)" if len(columns) > _NAMED else ""
    lines.append(("data", source["description"]))
    lines.append(("columns", ", ".join(columns[:_NAMED]) + more))
  lines += describe_counts(all_counts(corpus.rows), found.overflow, found.length)
  lines.append(("lengths", ", ".join(f"{name} {n:,}" for name, n in found.percentiles.items())
                + " tokens per document"))  # fmt: skip
  batches, size = found.batches_per_epoch, found.batch_size
  share = found.tokens_per_epoch / max(1, batches * size * found.length)
  lines.append(
    ("epoch", f"{plural(batches, 'step')} of {size} x {found.length} tokens, {share:.0%} filled")
  )
  if found.duplicates:
    lines.append(
      ("duplicates", f"{plural(found.duplicates, 'document')} the same as an earlier one")
    )
  if found.unknown["documents"]:
    shown = " ".join(found.unknown["characters"])
    lines.append(("unknown", f"{found.unknown['documents']:,} documents have characters that the "
                  f"tokenizer lacks: {shown}"))  # fmt: skip
  for reason, count in list(found.unusable["reasons"].items())[:_NAMED]:
    lines.append(("unusable", f"{count:,}: {reason}"))
  for place in found.unusable["first"]:
    lines.append(("", place))
  return f"{aligned(lines)}\n\n{histogram(found.tokens)}"


def histogram(tokens: Int64[np.ndarray, "n"]) -> str:
  """Returns a histogram of lengths, with bars up to the longest document."""
  if not len(tokens):
    return ""
  edges = bin_edges(tokens, _BARS)
  counts, _ = np.histogram(tokens, edges)
  width = len(f"{int(edges[-1]):,}")
  lines = ["tokens per document"]
  for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
    bar = "█" * round(_WIDTH * count / counts.max()) or ("▏" if count else "")
    lines.append(f"{int(start):>{width},} - {int(end) - 1:>{width},} {bar} {count:,}")
  return "\n".join(lines)


def bin_edges(tokens: Int64[np.ndarray, "n"], bars: int) -> Int64[np.ndarray, "m"]:
  """Returns edges of equal bins of a round width from 0 to above the largest number."""
  least = (int(tokens.max()) + 1) / bars
  scale = 10 ** int(np.floor(np.log10(max(1.0, least))))
  width = next(int(step * scale) for step in (1, 2, 5, 10) if step * scale >= least)
  return np.arange(0, int(tokens.max()) // width + 2, dtype=np.int64) * width


def plot(tokens: Int64[np.ndarray, "n"], path: Any) -> None:
  """Writes a histogram of lengths as a PNG."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  axes.hist(tokens, bins=bin_edges(tokens, 50))
  axes.set(xlabel="tokens per document", ylabel="documents")
  axes.grid(alpha=0.3)
  with path.open("wb") as file:
    figure.savefig(file, format="png", dpi=120)
  pyplot.close(figure)


def first_documents(corpus: RowCorpus, count: int) -> list[Any]:
  """Returns what is left of the documents of the first rows that have tokens to train on."""
  found = []
  for table in corpus.rows.tables:
    for row in range(len(table)):
      if len(found) == count:
        return found
      try:
        found.append(corpus.cut(table.document(row)))
      except Unusable:
        continue
  return found
