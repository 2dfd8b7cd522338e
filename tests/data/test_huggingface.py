"""Datasets of the `datasets` library, downloaded and streamed; local files, no network."""

import dataclasses
import itertools
import json

import datasets
import numpy as np
import pytest
import zstandard

from ll3m.data.config import (
  DatasetConfig,
  HuggingFaceDatasetConfig,
  SeqioDatasetConfig,
  TextProcessorConfig,
)
from ll3m.data.hub_rows import load_dataset
from ll3m.data.skipped_examples import Skipped
from tests.data.opening import open_dataset

EXAMPLES = [
  {"prompt": None if i % 9 == 4 else f"q{i}", "answer": f"a{i} " * (i % 5 + 1)} for i in range(60)
]
USABLE = [e for e in EXAMPLES if e["prompt"]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A dataset of two files, with a temporary cache."""
  folder = tmp_path_factory.mktemp("dataset")
  for i in range(2):
    text = "".join(f"{json.dumps(e)}\n" for e in EXAMPLES[30 * i : 30 * i + 30])
    (folder / f"part{i}.jsonl").write_text(text)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield str(folder)


def config(source, *, streaming, num_shards=4, **kwargs):
  return DatasetConfig(
    type="huggingface",
    huggingface_dataset=HuggingFaceDatasetConfig(path=source, streaming=streaming, **kwargs),
    text_processor=TextProcessorConfig("[prompt],answer"),
    seqio_dataset=SeqioDatasetConfig(
      batch_size=3, num_shards=num_shards, task_feature_lengths=(32,)
    ),
  )


def take(stream, count):
  return list(itertools.islice(stream, count))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_shards", [2, 4])  # by file, by example
def test_every_example_is_read_once(source, tokenizer, streaming, num_shards):
  stream = open_dataset(
    config(source, streaming=streaming, num_shards=num_shards),
    tokenizer, rows=range(3), repeat=False,
  )  # fmt: skip
  batches = list(stream)
  counts = {
    "tokens": sum(len(tokenizer.encode(e["prompt"] + "")) + len(tokenizer.encode(e["answer"])) + 1
                  for e in USABLE),
    "ends": len(USABLE),
  }  # fmt: skip
  tokens = np.concatenate([b.inputs[b.segment_ids > 0] for b in batches])
  assert counts == {"tokens": len(tokens), "ends": int(np.sum(tokens == tokenizer.eos_id))}
  assert stream.skipped.counts == {"field 'prompt' is null": len(EXAMPLES) - len(USABLE)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_a_stream_resumes_bitwise_on_another_number_of_processes(
  source, tokenizer, streaming, repeat
):
  def opened(rows):
    return open_dataset(
      config(source, streaming=streaming), tokenizer, rows=rows, seed=2, repeat=repeat
    )

  whole = opened(range(3))
  take(whole, 4)
  state = whole.state()
  expected = take(whole, 60)  # with `repeat`, several passes
  first, second = opened([1]), opened([2, 0])
  for part in (first, second):
    part.set_state(state)
  for batch in expected:
    one, two = next(first), next(second)
    for field, a, b in zip(batch, one, two, strict=True):
      np.testing.assert_array_equal(field, np.stack([b[1], a[0], b[0]]))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_the_field_is_an_error(source, tokenizer, streaming, caplog):
  wrong = dataclasses.replace(
    config(source, streaming=streaming), text_processor=TextProcessorConfig("txt")
  )
  message = rf"{source} has no usable row.*skipped 60: no field 'txt' \(60\); the first: .*row 1: "
  with pytest.raises(ValueError, match=message):
    next(open_dataset(wrong, tokenizer, rows=range(3)))


def test_reported_examples_are_not_reported_again_at_the_end():
  skipped = Skipped()
  assert skipped.describe_unreported() == ""
  skipped.warn_and_add("a", "empty")
  assert skipped.describe_unreported() == ""
  skipped.warn_and_add("b", "empty")
  assert skipped.describe_unreported() == "skipped 2: empty (2); the first: a: empty; b: empty"
  skipped.mark_reported()
  assert skipped.describe_unreported() == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_strict_stops_at_an_unusable_row(source, tokenizer, streaming):
  place = source if streaming else f"{source}, row 5"
  with pytest.raises(ValueError, match=rf"{place}: field 'prompt' is null \(`strict`\)$"):
    list(
      open_dataset(
        config(source, streaming=streaming), tokenizer, rows=range(3), repeat=False, strict=True
      )
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_shuffling_depends_on_the_seed(source, tokenizer, streaming):
  first = {
    seed: next(
      open_dataset(config(source, streaming=streaming), tokenizer, rows=range(3), seed=seed)
    ).inputs.tobytes()
    for seed in (1, 2)
  }
  assert first[1] != first[2]


def test_a_dataset_that_cannot_be_loaded_is_named(source, tokenizer):
  for kwargs in ({"split": "nowhere"}, {"name": "no_such_name"}):
    with pytest.raises(ValueError, match="dataset .* cannot be loaded"):
      open_dataset(config(source, streaming=False, **kwargs), tokenizer, rows=[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_may_be_compressed_and_have_a_byte_order_mark(source, tmp_path, streaming):
  text = b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n{"text": "c\xc2\x85d"}\n'
  (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(text))
  rows = load_dataset(str(tmp_path), None, "train", streaming=streaming)
  assert [row["text"] for row in rows] == ["a\u2028b", "c\x85d"]
