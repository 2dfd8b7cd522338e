"""The scan of rows: counts against tokenising row by row, and what stops it."""

import collections
import json
import subprocess
import sys

import numpy as np
import pytest

from ll3m.data import scanning
from ll3m.data.config import DatasetConfig, SeqioDatasetConfig, TokenizerConfig
from ll3m.data.examples import OpenSource
from ll3m.data.row_files import open_rows
from ll3m.data.shapes import SHAPES
from ll3m.data.skipped_examples import Skipped
from ll3m.data.sources import Source
from ll3m.data.text_processor import TextProcessor
from ll3m.data.tokenizer import load_tokenizer
from tests.data.opening import open_dataset


def write(folder, rows, name="rows.jsonl"):
  (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  return str(folder / name)


def opened(path, tokenizer, **options):
  return OpenSource(Source(path, files=(path,)), DatasetConfig(**options), tokenizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_equal_those_of_single_documents(workers, tmp_path, tokenizer, monkeypatch):
  monkeypatch.setattr(scanning, "_CHUNK", 10)
  monkeypatch.setattr(scanning, "_FEW", 20)
  rows = []
  for i in (*range(30), *range(30)):
    turns = (
      ("user", "if " * (i % 7) + f"<|im_end|> {i}"),
      ("assistant", "while " * (i * i % 23 + 1)),
    )
    rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
  rows[33] = {"messages": [{"role": "user", "content": "no answer"}]}
  skipped = Skipped()
  counting = scanning.Counting(24, "truncate", workers)
  table = opened(write(tmp_path, rows), tokenizer).scan(skipped, counting=counting)
  assert skipped.counts == {"messages has no assistant turn": 1}
  assert skipped.first == [f"{tmp_path}/rows.jsonl:34: messages has no assistant turn"]
  seen = collections.Counter()
  assert len(table) == 59
  for number, row in enumerate(row for i, row in enumerate(rows) if i != 33):
    tokens, loss = TextProcessor(SHAPES["messages"], tokenizer)(row)
    assert table.counts.tokens[number] == len(tokens)
    left = loss[1:24].sum()
    assert table.counts.trained[number] == left
    assert table.counts.kept[number] == (min(24, len(tokens)) if left else 0)
    seen[tokens.tobytes()] += 1
  assert len(set(table.counts.digests.tolist())) == len(seen) < 59
  assert not table.counts.unknown.any()


def test_characters_that_the_vocabulary_lacks_are_counted(tmp_path):
  from tokenizers import Tokenizer, models, pre_tokenizers

  encoder = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
  encoder.pre_tokenizer = pre_tokenizers.Whitespace()
  encoder.add_special_tokens(["</s>"])
  encoder.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
  path = write(tmp_path, [{"text": "a a"}, {"text": "a ü a ß"}])
  counting = scanning.Counting(24, "split")
  table = opened(path, tokenizer).scan(Skipped(), counting=counting)
  assert table.counts.unknown.tolist() == [0, 2]
  assert tokenizer.unknown_characters("a ü a ß") == {"ü", "ß"}


def test_rows_of_several_shapes_are_refused_with_both_places(tmp_path, tokenizer):
  alpaca = {"instruction": "a", "output": "b"}
  chat = {"messages": [{"role": "assistant", "content": "b"}]}
  path = write(tmp_path, [alpaca, {"other": 1}, chat])
  with pytest.raises(ValueError) as error:
    opened(path, tokenizer).scan(Skipped())
  said = str(error.value)
  assert said.startswith(f"{path}:3: ") and "the columns of messages" in said
  assert f"{path}:1 has those of instruction/input/output" in said and "`data_format`" in said
  skipped = Skipped()
  table = opened(path, tokenizer, data_format="messages").scan(skipped)
  assert len(table) == 1 and skipped.counts == {"no field 'messages'": 2}


def test_unusable_data_is_refused_after_a_thousand_rows(tmp_path, tokenizer):
  path = write(tmp_path, [{"text": None}] * 50_000)
  skipped = Skipped()
  with pytest.raises(
    ValueError, match=r"no usable row so far: skipped 1,000: field 'text' is null"
  ):
    opened(path, tokenizer).scan(skipped)
  first, many = {"text": "a"}, {"text": None}
  path = write(tmp_path, [*[many] * 900, first, *[many] * 5000])
  skipped = Skipped()
  assert len(opened(path, tokenizer).scan(skipped)) == 1
  assert skipped.counts == {"field 'text' is null": 5900}


def test_misspelt_columns_of_a_template_get_a_suggestion(tmp_path, tokenizer):
  path = write(tmp_path, [{"name": "a", "text": "b"}])
  message = r"no field 'nam' \(1\); .*; its columns are name, text \(did you mean 'name'\?\)$"
  with pytest.raises(ValueError, match=message):
    opened(path, tokenizer, prompt_template="{nam}", completion="{text}").scan(Skipped())


def test_empty_files_are_refused(tmp_path, tokenizer):
  for name in ("a.jsonl", "b.txt", "c.json"):
    path = tmp_path / name
    path.write_text("[]" if name == "c.json" else "")
    with pytest.raises(ValueError, match=f"{name} has no usable row: it is empty"):
      opened(str(path), tokenizer).scan(Skipped())


def test_one_pipeline_without_usable_rows_does_not_stop_a_stream(tmp_path, tokenizer, caplog):
  """Every eighth row is unusable, so that one of eight pipelines of a stream reads nothing else."""
  (tmp_path / "hub").mkdir()
  rows = [{"text": None if i % 8 == 3 else f"row {i}"} for i in range(16)]
  write(tmp_path / "hub", rows)
  from ll3m.data.config import HuggingFaceDatasetConfig

  for streaming in (False, True):
    config = DatasetConfig(
      type="huggingface",
      huggingface_dataset=HuggingFaceDatasetConfig(
        str(tmp_path / "hub"), split="train", streaming=streaming
      ),
      seqio_dataset=SeqioDatasetConfig(batch_size=8, num_shards=8, task_feature_lengths=(16,)),
    )
    stream = open_dataset(config, tokenizer, rows=range(8))
    batches = [next(stream) for _ in range(5)]
    used = np.stack([batch.segment_ids.any(axis=1) for batch in batches])
    assert used.all(axis=0).sum() == (7 if streaming else 8)
    assert (used.any(axis=0) == used.all(axis=0)).all()
  assert caplog.text.count("no usable example, so its rows are padding") == 1


def test_plain_text_is_divided_into_documents(tmp_path, tokenizer):
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\rfour\n\n\n\nfive")
  expected = {
    "file": ["one\ntwo\n\nthree\nfour\n\n\n\nfive"],
    "paragraph": ["one\ntwo", "three\nfour", "five"],
    "line": ["one", "two", "three\rfour", "five"],
  }
  for unit, texts in expected.items():
    rows = open_rows(str(tmp_path / "a.txt"), plain_text=unit)
    assert [rows.row(data)["text"] for _, _, _, data in rows.scan()] == texts


def test_unusable_rows_are_reported_by_source(tmp_path, tokenizer, caplog):
  paths = [
    write(tmp_path, [{"text": "a"}, {"text": value}], name=name)
    for name, value in (("a.jsonl", None), ("b.jsonl", ""))
  ]
  stream = open_dataset(DatasetConfig(data=",".join(paths)), tokenizer, rows=[0])
  reasons = ["field 'text' is null", "field 'text' is empty"]
  assert [record.getMessage() for record in caplog.records] == [
    f"{path}: 1 usable rows, skipped 1: {reason} (1); the first: {path}:2: {reason}"
    for path, reason in zip(paths, reasons, strict=True)
  ]
  assert stream.skipped.counts == dict.fromkeys(reasons, 1)
  assert stream.skipped.describe_unreported() == ""


_PROGRAM = """
import sys
from ll3m.data import scanning
from ll3m.data.config import DatasetConfig, TokenizerConfig
from ll3m.data.examples import OpenSource
from ll3m.data.skipped_examples import Skipped
from ll3m.data.sources import Source
from ll3m.data.tokenizer import load_tokenizer

print("started")
scanning._CHUNK = scanning._FEW = 10
rows, folder = sys.argv[1:]
tokenizer = load_tokenizer(TokenizerConfig(path=folder))
counting = scanning.Counting(24, "truncate", workers=2)
source = OpenSource(Source(rows, files=(rows,)), DatasetConfig(), tokenizer)
print(len(source.scan(Skipped(), counting=counting)), "jax" in sys.modules)
"""


def test_workers_do_not_import_the_program_that_starts_them(tmp_path, folder):
  """A program is imported by spawned workers otherwise, which this one does not expect."""
  program = tmp_path / "program.py"
  program.write_text(_PROGRAM)
  rows = write(tmp_path, [{"text": f"row {i}"} for i in range(40)])
  done = subprocess.run(
    [sys.executable, str(program), rows, str(folder)], capture_output=True, text=True, check=False
  )
  assert done.stdout.split() == ["started", "40", "False"], done.stderr
