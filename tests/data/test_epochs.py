"""Streams of whole epochs: every row as often as asked for, and a length known in advance."""

import collections
import itertools
import json

import datasets
import numpy as np
import pytest

from ll3m import data
from ll3m.data.examples import divide

LENGTH = 32


def texts(count):
  """Texts of very different lengths, some longer than a row, that are all different."""
  return [f"row {i}: " + "if x: " * (i * i % 29) for i in range(count)]


def write(folder, kind, rows):
  """Writes rows with the library that owns the format."""
  table = datasets.Dataset.from_list(rows)
  match kind:
    case "jsonl":
      (folder / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    case "json":
      (folder / "a.json").write_text(json.dumps(rows, indent=2))
    case "indented":
      (folder / "a.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    case "csv" | "parquet":
      getattr(table, f"to_{kind}")(folder / f"a.{kind}")
    case "saved":
      table.save_to_disk(folder)
    case "txt":
      (folder / "a.txt").write_text("\n".join(row["text"] for row in rows))
  return str(folder)


KINDS = ("jsonl", "json", "indented", "csv", "parquet", "saved", "txt")


def load(folder, tokenizer, **options):
  options = {"batch_size": 3, "length": LENGTH, "seed": 5, "plain_text": "line"} | options
  return data.load(folder, tokenizer, **options)


def documents_of(batches, tokenizer):
  """Returns the texts of the documents, each put together from its segments, as a counter.

  Rows of several pipelines alternate, so this is for streams of one pipeline.
  """
  tokens = np.concatenate([b.inputs[b.segment_ids > 0] for b in batches])
  ends = np.flatnonzero(tokens == tokenizer.eos_id)
  parts = np.split(tokens, ends + 1)[:-1]
  return collections.Counter(tokenizer.decode(part[:-1]) for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_read_once_per_epoch_whatever_the_file(kind, tmp_path, tokenizer):
  rows = [{"text": text.strip()} for text in texts(23)]
  stream = load(write(tmp_path, kind, rows), tokenizer, epochs=3)
  batches = list(stream)
  assert documents_of(batches, tokenizer) == {row["text"]: 3 for row in rows}
  assert len(batches) == stream.num_batches


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("overflow", ["split", "truncate", "drop", "keep_end"])
@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("weights", [False, True])
def test_number_of_batches_is_known_in_advance(
  tmp_path, tokenizer, pack, overflow, num_shards, weights
):
  for name, count in (("a", 23), ("b", 7)):
    rows = [{"text": text} for text in texts(count)]
    (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  a, b = (f"{tmp_path}/{name}.jsonl" for name in "ab")
  for shuffle, epochs in itertools.product((True, False), (1, 3)):
    stream = load(
      f"{a}=0.4,{b}=0.6" if weights else f"{a},{b}", tokenizer, epochs=epochs, pack=pack,
      overflow=overflow, num_shards=num_shards, shuffle=shuffle,
    )  # fmt: skip
    batches = list(stream)
    assert len(batches) == stream.num_batches
    assert batches[-1].segment_ids.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["", "=1"])
def test_resuming_in_the_middle_of_an_epoch_is_bitwise(kind, weights, tmp_path, tokenizer):
  rows = [{"text": text.strip()} for text in texts(23)]
  source = write(tmp_path, kind, rows) + weights

  def opened():
    return load(source, tokenizer, epochs=3, overflow="truncate")

  whole = list(opened())
  for place in (1, len(whole) // 2, len(whole) - 1, len(whole)):
    first, second = opened(), opened()
    list(itertools.islice(first, place))
    second.set_state(first.state())
    rest = list(second)
    assert len(rest) == len(whole) - place
    for one, other in zip(rest, whole[place:], strict=True):
      for field, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(field, expected)


@pytest.mark.parametrize("overflow", ["split", "truncate"])
@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_finished_stream_continues_with_more_epochs(tmp_path, tokenizer, overflow, num_shards):
  rows = [{"text": text} for text in texts(23)]
  source = write(tmp_path, "jsonl", rows)
  options = {"overflow": overflow, "num_shards": num_shards}
  streams = [load(source, tokenizer, epochs=epochs, **options) for epochs in (1, 2, 4)]
  batches = list(streams[0])
  once = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
  # To two epochs after its end, and to four in the middle of the second one.
  streams[1].set_state(streams[0].state())
  added = streams[1].num_batches - len(batches)
  batches += itertools.islice(streams[1], added // 2)
  resumed = load(source, tokenizer, epochs=2, **options)
  resumed.set_state(streams[1].state())
  assert resumed.num_batches == streams[1].num_batches
  assert len(list(resumed)) == added - added // 2
  streams[2].set_state(streams[1].state())
  batches += list(streams[2])
  assert streams[2].num_batches == len(batches)
  if num_shards == 1 and overflow == "split":
    assert documents_of(batches, tokenizer) == {row["text"]: 4 for row in rows}
  assert sum(int((batch.segment_ids > 0).sum()) for batch in batches) == 4 * once


def test_weights_are_shares_of_the_rows_of_an_epoch(tmp_path, tokenizer):
  for name, count in (("a", 30), ("b", 10)):
    rows = [{"text": f"{name} {i}"} for i in range(count)]
    (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  source = f"{tmp_path}/a.jsonl=0.25,{tmp_path}/b.jsonl=0.75"
  found = documents_of(load(source, tokenizer, epochs=4), tokenizer)
  by_source = collections.Counter()
  for text, count in found.items():
    by_source[text[0]] += count
  assert by_source == {"a": 40, "b": 120}  # 4 epochs of 40 rows, divided 1 : 3
  # Every source is read through before any of its rows is read again.
  assert {found[f"a {i}"] for i in range(30)} == {1, 2}
  assert {found[f"b {i}"] for i in range(10)} == {12}
  # At no time does a source lag behind its share by more than the shuffle allows: without
  # shuffling, by more than one row.
  stream = load(source, tokenizer, epochs=1, shuffle=False, pack=False, batch_size=1)
  order = [tokenizer.decode(b.inputs[0][:1]) for b in stream]
  for n in range(1, len(order) + 1):
    assert abs(order[:n].count("a") - 0.25 * n) <= 1


@pytest.mark.parametrize(
  ("total", "weights", "shares"),
  [
    (10, [1.0, 1.0], [5, 5]),
    (10, [0.7, 0.3], [7, 3]),
    (10, [1.0, 1.0, 1.0], [4, 3, 3]),
    (10, [99.0, 1.0], [9, 1]),
    (3, [1000.0, 1.0, 1.0], [2, 1, 1]),
  ],
)
def test_totals_are_divided_by_largest_remainders(total, weights, shares):
  assert divide(total, weights) == shares


def test_held_out_rows_and_the_others_are_the_whole(tmp_path, tokenizer):
  rows = [{"text": f"row {i}"} for i in range(40)]
  source = write(tmp_path, "jsonl", rows)
  options = {"eval_fraction": 0.1}
  trained = documents_of(load(source, tokenizer, epochs=1, **options), tokenizer)
  held_out = documents_of(load(source, tokenizer, held_out=True, **options), tokenizer)
  assert list(held_out) == [f"row {i}" for i in (9, 19, 29, 39)]
  assert trained + held_out == {row["text"]: 1 for row in rows}
  few = documents_of(load(source, tokenizer, held_out=True, eval_fraction=0.001), tokenizer)
  assert few == {"row 39": 1}


def test_wrong_options_are_refused(tmp_path, tokenizer):
  source = write(tmp_path, "jsonl", [{"text": "a"}])
  with pytest.raises(ValueError, match="epochs must be at least 1"):
    load(source, tokenizer, epochs=0)
  with pytest.raises(ValueError, match="held_out needs eval_fraction"):
    load(source, tokenizer, held_out=True)
  with pytest.raises(ValueError, match="leaves no row to train on, of 1"):
    load(source, tokenizer, eval_fraction=0.5)
  with pytest.raises(ValueError, match="`epochs` cannot be used with mixtures"):
    load("mixture:python_mixture", tokenizer, epochs=1)
  source = write(tmp_path, "jsonl", [{"text": "if x: return"}])
  with pytest.raises(ValueError, match="no row with a token to train on"):
    load(source, tokenizer, epochs=1, length=2, overflow="drop")
  with pytest.raises(ValueError, match="no usable example: skipped .*longer than 2 tokens"):
    next(load(source, tokenizer, length=2, overflow="drop"))
