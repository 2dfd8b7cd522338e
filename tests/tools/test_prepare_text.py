"""Text files to TFRecord shards, from the command line to the mixture that reads them."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def prepare(*flags):
  return subprocess.run(
    [sys.executable, ROOT / "tools" / "prepare_text.py", *flags],
    capture_output=True, text=True, check=False,
  )  # fmt: skip


def read_shards(folder, split):
  """All examples as (id, text), by file; read with the library's own parser of the format."""
  import tensorflow as tf

  files = sorted(folder.glob(f"{split}-*.tfrecord"))
  examples = []
  for file in files:
    records = [tf.train.Example.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(file))]
    features = [record.features.feature for record in records]
    examples.append([tuple(f[k].bytes_list.value[0].decode() for k in ("id", "text"))
                     for f in features])  # fmt: skip
  return files, examples


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  objects = [{"id": f"a{i}", "text": f"text {i}\n{'x' * (i % 11)}"} for i in range(90)]
  bad = [
    "{nonsense",
    "",
    "[1]",
    '{"id": "b"}',
    '{"text": 3}',
    '{"text": " "}',
    '{"text":"\\ud800"}',
  ]
  lines = [json.dumps(o) for o in objects]
  (folder / "a.jsonl").write_text("\n".join(lines[:40] + bad + lines[40:]))
  zipped = [{"id": f"z{i}", "text": f"über {i}"} for i in range(30)]
  with gzip.open(folder / "b.json.gz", "wt") as file:
    file.write("".join(f"{json.dumps(o)}\r\n" for o in zipped))
  (folder / "c.txt").write_text("one paragraph\nof two lines\n\nand another\n")
  (folder / "d.txt").write_bytes(b"\xff\xfe broken")
  return folder, [(o["id"], o["text"]) for o in objects + zipped]


def test_shards_hold_every_document_once_in_order(corpus, tmp_path):
  folder, documents = corpus
  documents = [*documents, ("c.txt:1", "one paragraph\nof two lines\n\nand another")]
  outputs = []
  for workers in (1, 3):
    output = tmp_path / f"data{workers}" / "wiki"
    done = prepare(f"--input={folder}/a.*", f"--input={folder}/*.gz", f"--input={folder}/*.txt",
                   f"--output_dir={output}", "--num_shards=3", "--validation_fraction=0.1",
                   f"--workers={workers}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train: 109 documents, validation: 12 documents" in done.stdout
    skipped = done.stdout.split("skipped ")[1]
    assert skipped.startswith("7: ")
    for reason in (
      "not JSON", "not a JSON object", "no field 'text'", "field 'text' is not text", "not UTF-8",
      "empty text", "not Unicode text",
    ):  # fmt: skip
      assert f"{reason} (1)" in skipped
    outputs.append({p.name: p.read_bytes() for p in output.iterdir()})
  assert outputs[0] == outputs[1]  # whatever the number of workers
  held_out = documents[9::10]
  for split, expected in (
    ("train", [d for d in documents if d not in held_out]),
    ("validation", held_out),
  ):
    files, examples = read_shards(output, split)
    assert [f.name for f in files] == [f"{split}-{i:05d}-of-00003.tfrecord" for i in range(3)]
    assert examples == [expected[i::3] for i in range(3)]


def test_strict_stops_at_a_document_that_cannot_be_used(corpus, tmp_path):
  folder, _ = corpus
  done = prepare(
    f"--input={folder}/*.jsonl", f"--output_dir={tmp_path}/x", "--workers=1", "--strict"
  )
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == f"error: {folder}/a.jsonl:41: not JSON (--strict)"
  assert not list((tmp_path / "x").iterdir())


def test_paragraphs_may_be_documents_and_shards_are_never_overwritten(corpus, tmp_path):
  folder, _ = corpus
  done = prepare(f"--input={folder}/c.txt", f"--output_dir={tmp_path}/x", "--num_shards=1",
                 "--plain_text=paragraph", "--validation_fraction=0", "--workers=1")  # fmt: skip
  assert done.returncode == 0, done.stderr
  _, (examples,) = read_shards(tmp_path / "x", "train")
  assert examples == [("c.txt:1", "one paragraph\nof two lines"), ("c.txt:4", "and another")]
  again = prepare(f"--input={folder}/c.txt", f"--output_dir={tmp_path}/x")
  assert again.returncode == 1
  assert (
    again.stderr.strip()
    .splitlines()[-1]
    .endswith("x already holds shards of train: choose another --output_dir")
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--input=nowhere/*.jsonl"], "--input: no file matches 'nowhere/*.jsonl'"),
    ([], "--input must be given"),
    ([f"--input={__file__}"], "--input expects files that end in .jsonl"),
  ],
)
def test_bad_input_is_one_sentence(tmp_path, flags, message):
  done = prepare(*flags, f"--output_dir={tmp_path}/x")
  assert done.returncode == 1 and not (tmp_path / "x").exists()
  assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}")


def test_too_few_documents_leave_no_shards(corpus, tmp_path):
  folder, _ = corpus
  done = prepare(f"--input={folder}/c.txt", f"--output_dir={tmp_path}/x")
  assert done.returncode == 1
  assert "error: no document for the validation split: 1 in all" in done.stderr
  assert not list((tmp_path / "x").iterdir())
