"""Streams of batches: their order, resuming, and splitting over processes.

Oracle for the order: lines are dealt to shards in turn, each shard's tokens are split into rows,
and rows are dealt to batches. Oracle for resuming and splitting: the same stream on one process,
uninterrupted.
"""

import collections
import itertools
import json

import numpy as np
import pytest

from ll3m.data.batch import Batch
from ll3m.data.config import (
  DatasetConfig,
  JsonDatasetConfig,
  SeqioDatasetConfig,
  TextProcessorConfig,
)
from tests.data.opening import open_dataset

LENGTH = 24


def options(**kwargs) -> SeqioDatasetConfig:
  return SeqioDatasetConfig(**{"task_feature_lengths": (LENGTH,)} | kwargs)


def json_config(path: str, fields: str = "", **kwargs) -> DatasetConfig:
  return DatasetConfig(
    type="json",
    json_dataset=JsonDatasetConfig(path=path),
    text_processor=TextProcessorConfig(fields),
    seqio_dataset=options(**kwargs),
  )


def lines(count: int) -> list[dict[str, str]]:
  """Examples of very different lengths."""
  return [{"text": f"{i}: " + "if x: " * (i * i % 29)} for i in range(count)]


def take(stream, count: int) -> list[Batch]:
  return list(itertools.islice(stream, count))


def join(*parts: Batch) -> Batch:
  """Joins the rows that several processes have read to a batch, in the order of the processes."""
  return Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def documents_of(batches: list[Batch], end: int) -> list[tuple[int, ...]]:
  """Returns the tokens of all rows in order, split after every EOS."""
  tokens = [t for b in batches for row in zip(b.inputs, b.segment_ids, strict=True)
            for t, segment in zip(*row, strict=True) if segment]  # fmt: skip
  documents, start = [], 0
  for i, token in enumerate(tokens):
    if token == end:
      documents.append(tuple(int(t) for t in tokens[start : i + 1]))
      start = i + 1
  assert start == len(tokens)
  return documents


def document_of(tokenizer, text: str) -> list[int]:
  return [*tokenizer.prefix, *tokenizer.encode(text), tokenizer.eos_id]


@pytest.mark.parametrize(("batch_size", "num_shards"), [(4, 4), (3, 4), (8, 3), (2, 1)])
def test_lines_are_dealt_to_shards_and_rows_to_batches(
  write_jsonl, tokenizer, batch_size, num_shards
):
  examples = lines(31)
  config = json_config(write_jsonl(*examples), batch_size=batch_size, num_shards=num_shards)
  stream = open_dataset(config, tokenizer, rows=range(batch_size), repeat=False)
  rows = []
  for shard in range(num_shards):
    own = [t for e in examples[shard::num_shards] for t in document_of(tokenizer, e["text"])]
    rows.append([own[i : i + LENGTH] for i in range(0, len(own), LENGTH)])
  found = [row[segments > 0].tolist() for b in stream for row, segments in zip(b[0], b[3],
           strict=True)]  # fmt: skip
  expected = [rows[r % num_shards][r // num_shards] if r // num_shards < len(rows[r % num_shards])
              else [] for r in range(len(found))]  # fmt: skip
  assert found == expected
  assert sum(map(len, found)) == sum(len(row) for shard in rows for row in shard)


@pytest.mark.parametrize(
  ("batch_size", "num_shards", "repeat"), [(3, 3, True), (2, 3, True), (2, 4, True), (2, 3, False)]
)
def test_any_number_of_processes_can_restore_a_position(
  write_jsonl, tokenizer, batch_size, num_shards, repeat
):
  config = json_config(
    write_jsonl(*lines(40)), batch_size=batch_size, num_shards=num_shards, shuffle=True
  )

  def opened(rows):
    return open_dataset(config, tokenizer, rows=rows, seed=5, repeat=repeat)

  whole = opened(range(batch_size))
  take(whole, 3)
  expected = take(whole, 40 if repeat else 1000)
  first, second = opened([0]), opened(range(1, batch_size))
  take(first, 3), take(second, 3)
  states = {**second.state(), **first.state()}
  # Restores with another division of the rows, and on one process.
  for division in ([range(batch_size - 1), [batch_size - 1]], [range(batch_size)]):
    processes = [opened(rows) for rows in division]
    for process in processes:
      process.set_state(states)
    found = [join(*(next(p, p.padding()) for p in processes)) for _ in expected]
    np.testing.assert_equal(found, expected)
  if batch_size == num_shards:
    assert sorted(first.state()) == ["shard_00000"]  # runs only its own pipelines


def test_the_built_in_mixture_resumes_bitwise_across_passes(tokenizer):
  config = DatasetConfig(
    seqio_dataset=SeqioDatasetConfig(
      mixture_or_task_name="python_mixture",
      batch_size=2,
      num_shards=2,
      task_feature_lengths=(2048,),
    )
  )

  def opened(seed=1):
    return open_dataset(config, tokenizer, rows=range(2), seed=seed)

  stream, restored = opened(), opened()
  take(stream, 5)
  state = stream.state()
  expected = take(stream, 90)  # more than one pass through the documents
  restored.set_state(state)
  np.testing.assert_equal(take(restored, 90), expected)
  seen = {b.inputs.tobytes() for b in expected}
  assert len(seen) == len(expected)
  assert not np.array_equal(next(opened(1)).inputs, next(opened(2)).inputs)


def test_held_out_text_is_not_trained_on():
  from ll3m.data import seqio_sources

  for read in (seqio_sources.python_reference, seqio_sources.package_descriptions):
    train, held_out = read("train"), read("validation")
    assert held_out and not set(train) & set(held_out)
    assert 0.02 < len(held_out) / len(train) < 0.3
    assert read("train") == train


def test_a_second_run_uses_its_own_tokenizer(tokenizer, mistral_model):
  from ll3m.data.config import TokenizerConfig
  from ll3m.data.tokenizer import load_tokenizer

  config = DatasetConfig(
    seqio_dataset=options(mixture_or_task_name="python_reference", num_shards=1, batch_size=1)
  )
  mistral = load_tokenizer(TokenizerConfig(path=str(mistral_model)))
  texts = []
  for encoder in (tokenizer, mistral):
    stream = open_dataset(config, encoder, rows=[0], repeat=False)
    row = next(stream).inputs[0]
    assert (row[0] == 1) == (encoder is mistral)  # BOS, where the family has one
    texts.append(encoder.decode(row))
  assert texts[0][:15] == texts[1][:15]


BAD = {
  b'{"text": "cut': "not JSON",
  b'{"text": "a raw \0"}': "not JSON",
  b'{"txt": "misspelt"}': "no field 'text'",
  b'{"text": "\xff\xfe"}': "not UTF-8",
  b'{"text": ""}': "field 'text' is empty",
  b'{"text": [7]}': "field 'text' is a list, not text",
  b'["text"]': "not a JSON object",
  b'{"text": "a\\ud800b"}': "not Unicode text",
}


def test_unusable_lines_are_skipped_counted_and_the_first_are_named(tmp_path, tokenizer, caplog):
  texts = ["first", "an escaped \0", "if x: " * 200_000, "last"]
  good = [json.dumps({"text": text}).encode() for text in texts]
  good[-1] = good[-1][:-1] + b', "more": "' + b"x" * 10_000_000 + b'"}'
  path = tmp_path / "data.jsonl"
  path.write_bytes(b"\n".join([good[0], b"", *BAD, *good[1:]]))
  config = json_config(str(path), batch_size=1, num_shards=1, task_feature_lengths=(100_000,))
  stream = open_dataset(config, tokenizer, rows=[0], repeat=False)
  tokens = np.concatenate([batch.inputs[batch.segment_ids > 0] for batch in stream])
  assert tokenizer.decode(tokens) == "".join(texts)
  assert stream.skipped.counts == collections.Counter(BAD.values())
  named = "; ".join(f"{path}:{n}: {r}" for n, r in zip((3, 4, 5), BAD.values(), strict=False))
  assert f"{path}: 4 usable rows, skipped 8: not JSON (2), " in caplog.text
  assert f"; the first: {named}\n" in caplog.text
  with pytest.raises(ValueError, match=f"^{path}:3: not JSON \\(`strict`\\)$"):
    open_dataset(config, tokenizer, rows=[0], strict=True)
  wanted = json_config(str(path), "prompt")
  with pytest.raises(ValueError, match=r"no usable row: .*12: no field 'prompt' \(8\)"):
    open_dataset(wanted, tokenizer, rows=[0])


def test_strict_accepts_files_of_usable_lines(write_jsonl, tokenizer):
  config = json_config(write_jsonl(*lines(5), "", *lines(5)))
  assert next(open_dataset(config, tokenizer, rows=range(8), strict=True)).mask.any()


def test_fewer_lines_than_shards_reduce_the_number_of_shards(write_jsonl, tokenizer):
  stream = open_dataset(json_config(write_jsonl(*lines(3))), tokenizer, rows=range(8))
  assert stream.num_shards == 3
  assert all((b.segment_ids > 0).all() for b in take(stream, 5))


def test_unpacked_documents_have_rows_of_their_own(write_jsonl, tokenizer):
  examples = [{"prompt": "if x" * i, "answer": "y"} for i in range(1, 12)]
  config = json_config(write_jsonl(*examples), "[prompt],answer", pack=False, num_shards=1,
                       batch_size=2, task_feature_lengths=(64,))  # fmt: skip
  batches = list(open_dataset(config, tokenizer, rows=range(2), repeat=False))
  assert [b.segment_ids.max() for b in batches] == [1] * 6
  first = batches[0]
  count = len(tokenizer.encode("if x"))
  assert first.mask[0].tolist() == [0.0] * (count - 1) + [1.0] * 2 + [0.0] * (63 - count)
  assert first.targets[0, count : count + 1] == tokenizer.eos_id


def test_exhausted_shards_yield_padding_until_all_shards_end(write_jsonl, tokenizer):
  config = json_config(write_jsonl({"text": "x"}, {"text": "if x: " * 60}), batch_size=2)
  stream = open_dataset(config, tokenizer, rows=range(2), repeat=False)
  batches = list(stream)
  assert all(not b.segment_ids[0].any() and not b.mask[0].any() for b in batches[1:])
  assert all(b.segment_ids[1].any() for b in batches)
  np.testing.assert_equal(list(stream), [])
  padding = stream.padding()
  assert [a.shape for a in padding] == [(2, LENGTH)] * 5 and not padding.segment_ids.any()


def test_positions_of_another_stream_are_refused(write_jsonl, tokenizer):
  path = write_jsonl(*lines(40))
  stream = open_dataset(json_config(path), tokenizer, rows=range(8))
  take(stream, 2)
  state = stream.state()
  other = json_config(path, num_shards=4)
  with pytest.raises(ValueError, match="another stream: .*num_shards was 8, is 4"):
    open_dataset(other, tokenizer, rows=range(8)).set_state(state)
  with pytest.raises(ValueError, match="another stream: seed was 42, is 1"):
    open_dataset(json_config(path), tokenizer, rows=range(8), seed=1).set_state(state)
  del state["shard_00003"]
  with pytest.raises(ValueError, match="lacks shard_00003 of 8"):
    stream.set_state(state)
  open_dataset(json_config(path), tokenizer, rows=[0, 1]).set_state(state)
  with pytest.raises(ValueError, match="different steps"):
    next(stream)
    stream.set_state(state | {"shard_00001": stream.state()["shard_00001"]})
  with pytest.raises(ValueError, match="is empty"):
    stream.set_state({})
  with pytest.raises(ValueError, match="damaged: shard_00001"):
    stream.set_state(state | {"shard_00001": state["shard_00001"][:-9]})


def test_rows_outside_of_the_batch_are_refused(write_jsonl, tokenizer):
  for rows in ([8], [-1], []):
    with pytest.raises(ValueError, match="rows must .* 8, got "):
      open_dataset(json_config(write_jsonl(*lines(9))), tokenizer, rows=rows)


def test_a_position_can_be_restored_with_a_longer_row(write_jsonl, tokenizer):
  path = write_jsonl(*lines(30))
  short = open_dataset(json_config(path, num_shards=1, batch_size=1), tokenizer, rows=[0],
                       repeat=False)  # fmt: skip
  read = take(short, 4)
  config = json_config(path, num_shards=1, batch_size=1, task_feature_lengths=(50,))
  longer = open_dataset(config, tokenizer, rows=[0], repeat=False)
  longer.set_state(short.state())
  found = documents_of([*read, *longer], tokenizer.eos_id)
  assert found == [tuple(document_of(tokenizer, e["text"])) for e in lines(30)]


def test_files_of_different_kinds_form_one_dataset(tmp_path, tokenizer):
  import gzip

  import datasets
  import zstandard

  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "if"}\n{"text": "x"}'))
  (tmp_path / "b.jsonl").write_bytes(
    b'\xef\xbb\xbf{"text": "for"}\r\n\r\n{"text": "a\xe2\x80\xa8b"}'
  )
  (tmp_path / "c.jsonl").touch()
  array = json.dumps([{"text": "in"}, {"text": 3}, {"text": "try"}], indent=1)
  (tmp_path / "d.json.zst").write_bytes(zstandard.compress(array.encode()))
  (tmp_path / "e.csv").write_text('text,n\n"1\n2",3\n007,4\n')
  datasets.Dataset.from_dict({"text": ["p", None]}).to_parquet(tmp_path / "f.parquet")
  config = json_config(f"{tmp_path}/*.*", num_shards=1, batch_size=1)

  def opened():
    return open_dataset(config, tokenizer, rows=[0], repeat=False)

  stream = opened()
  found = documents_of(list(stream), tokenizer.eos_id)
  texts = ["if", "x", "for", "a\u2028b", "in", "3", "try", "1\n2", "007", "p"]
  assert [tokenizer.decode(d) for d in found] == texts
  assert stream.skipped.first == [f"{tmp_path}/f.parquet, row 2: field 'text' is null"]
  whole = opened()
  take(whole, 1)
  resumed = opened()
  resumed.set_state(whole.state())
  for one, other in zip(whole, resumed, strict=True):
    np.testing.assert_array_equal(one.inputs, other.inputs)
  (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
  with pytest.raises(ValueError, match="g.jsonl.gz .* gzip"):
    opened()
