"""The estimate of an epoch's size; the oracle is the stream of one epoch, read to its end."""

import json

import numpy as np
import pytest

from ll3m.data.config import DatasetConfig, SeqioDatasetConfig
from ll3m.data.dataset_spec import resolve
from ll3m.data.epoch_estimate import EpochEstimate, estimate_epoch, rounded
from ll3m.data.row_corpus import open_corpus
from tests.data.opening import open_dataset


def rows_of(count):
  lengths = np.random.default_rng(0).integers(1, 14, count).tolist()
  return [{"prompt": f"row {i}: ", "completion": "if x: " * n} for i, n in enumerate(lengths)]


def write(folder, rows):
  path = folder / "rows.jsonl"
  path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return str(path)


def estimate(config, tokenizer):
  spec = resolve(config)
  return estimate_epoch(open_corpus(spec, tokenizer), spec)


@pytest.mark.parametrize(
  ("overflow", "pack"), [("split", True), ("truncate", True), ("truncate", False)]
)
@pytest.mark.parametrize(("count", "within"), [(400, 0.01), (1500, 0.03)])
def test_the_size_of_an_epoch(tokenizer, tmp_path, count, within, overflow, pack):
  """All of 400 rows are read; what then differs is the padding of the last batch."""
  options = SeqioDatasetConfig(batch_size=2, task_feature_lengths=(40,), pack=pack, shuffle=False)
  config = DatasetConfig(
    data=write(tmp_path, rows_of(count)), overflow=overflow, seqio_dataset=options
  )
  found = estimate(config, tokenizer)
  stream = open_dataset(config, tokenizer, rows=range(2), repeat=False)
  batches, tokens, trained = 0, 0, 0
  for batch in stream:
    batches += 1
    tokens += int((batch.segment_ids > 0).sum())
    trained += int(batch.mask.sum())
  assert found.tokens == pytest.approx(tokens, rel=within)
  assert found.batches == pytest.approx(batches, rel=within)
  assert found.per_document == pytest.approx(tokens / count, rel=within)
  # A trained token at the beginning of a row is no target.
  assert found.trained == pytest.approx(trained / tokens, abs=0.01 if overflow != "split" else 0.04)


def test_few_tokens_are_read(tokenizer, tmp_path, monkeypatch):
  config = DatasetConfig(data=write(tmp_path, rows_of(4000)))
  exact = estimate(config, tokenizer)
  monkeypatch.setattr("ll3m.data.epoch_estimate._MOST_TOKENS", 10_000)
  short = estimate(config, tokenizer)
  assert short.tokens == pytest.approx(exact.tokens, rel=0.05)


def test_rows_without_tokens_to_train_on_have_no_estimate(tokenizer, tmp_path):
  rows = [{"prompt": "a " * 60, "completion": "b"}] * 3
  options = SeqioDatasetConfig(task_feature_lengths=(10,))
  config = DatasetConfig(data=write(tmp_path, rows), seqio_dataset=options)
  assert estimate(config, tokenizer) is None


def test_words():
  found = EpochEstimate(tokens=73_900.0, trained=0.318, per_document=14.4, batches=123.4)
  assert found.describe() == "about 74,000 per epoch, 32% of them trained; about 14 per document"
  assert found.describe_steps(62, 2) == "about 1 epoch of 62 steps"
  assert found.describe_steps(1000, 1) == "about 8.1 epochs of 120 steps"
  assert [rounded(x) for x in (0.0123, 9.96, 1.5e6)] == ["0.012", "10", "1,500,000"]
