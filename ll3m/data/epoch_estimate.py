"""The size of an epoch, estimated from some of its rows, for runs that do not count all tokens."""

import dataclasses

import numpy as np
from jaxtyping import Int64

from ll3m.data.dataset_spec import DataSpec
from ll3m.data.epochs import count_rows
from ll3m.data.row_corpus import RowCorpus
from ll3m.data.skipped_examples import Unusable

_MOST_ROWS, _MOST_TOKENS = 1000, 2**20  # in a sample
_MOST_PACKED = 10_000  # documents whose batches are counted


@dataclasses.dataclass(frozen=True)
class EpochEstimate:
  """Estimate of an epoch's size.

  Attributes:
    tokens: Number of tokens in an epoch, after documents were cut off.
    trained: Fraction of these that are trained.
    per_document: Mean number of tokens of a document, without unusable ones.
    batches: Number of batches in an epoch; may be a fraction.
  """

  tokens: float
  trained: float
  per_document: float
  batches: float

  def describe(self) -> str:
    """Returns the tokens in words, as `dataset_report.describe_counts` does for counted rows."""
    return (
      f"about {rounded(self.tokens)} per epoch, {self.trained:.0%} of them trained; about "
      f"{rounded(self.per_document)} per document"
    )

  def describe_steps(self, steps: int, accumulate: int) -> str:
    """Returns optimizer steps of some batches each as epochs: "about 2.5 epochs of 120 steps"."""
    each = self.batches / accumulate
    count = rounded(steps / each)
    return f"about {count} epoch{'' if count == '1' else 's'} of {rounded(each)} steps"


def estimate_epoch(corpus: RowCorpus, spec: DataSpec) -> EpochEstimate | None:
  """Estimates the size of a corpus of numbered rows from a sample that is spread over them.

  The same rows are read every time: at most 1,000, and until they have 2^20 tokens. If none of
  them is usable, None is returned.
  """
  kept, trained = _sample(corpus)
  if not kept.any():
    return None
  options, scale = spec.config.seqio_dataset, len(corpus.rows) / len(kept)
  if options.pack and corpus.overflow == "split":
    rows = kept.sum() / options.length * scale
  else:
    packed = np.resize(kept, min(len(corpus.rows), _MOST_PACKED))
    rows = count_rows(packed.tolist(), options, corpus.overflow) * len(corpus.rows) / len(packed)
  return EpochEstimate(
    tokens=float(kept.sum() * scale),
    trained=float(trained.sum() / kept.sum()),
    per_document=float(kept.sum() / np.count_nonzero(kept)),
    batches=float(rows / options.batch_size),
  )


def _sample(corpus: RowCorpus) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
  """Returns the numbers of tokens that are left of some documents, and of the trained ones."""
  found, read = [], 0
  for number in _spread(len(corpus.rows)):
    try:
      document = corpus.cut(corpus.rows.document(0, number))
      found.append((len(document.tokens), int(document.loss[1:].sum())))
    except Unusable:
      found.append((0, 0))
    read += found[-1][0]
    if read >= _MOST_TOKENS:
      break
  kept, trained = np.array(found, np.int64).T
  return kept, trained


def _spread(count: int) -> list[int]:
  """Returns at most 1,000 different numbers below `count`, such that the first are spread too."""
  if count <= _MOST_ROWS:
    return list(range(count))
  fractions = np.arange(_MOST_ROWS) * (np.sqrt(5) - 1) / 2 % 1
  return list(dict.fromkeys((fractions * count).astype(np.int64).tolist()))


def rounded(value: float) -> str:
  """Returns a number with two significant digits, as "74,000" or "0.25"."""
  value = float(f"{value:.2g}")
  return f"{value:,.0f}" if value >= 10 else f"{value:g}"
