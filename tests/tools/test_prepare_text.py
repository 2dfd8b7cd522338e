"""Conversion of text files to TFRecord shards, by command line and in this process."""

import gzip
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).parents[2]


def prepare(*flags):
  return subprocess.run(
    [sys.executable, ROOT / "tools" / "prepare_text.py", *flags],
    capture_output=True, text=True, check=False,
  )  # fmt: skip


def read_shards(folder, split):
  """Returns the files, and the examples of each as (id, text), read by TensorFlow."""
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
  (folder / "d.txt").write_bytes(b"Latin-1: \xfcber")
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
  assert outputs[0] == outputs[1]  # for any number of workers
  held_out = documents[9::10]
  for split, expected in (
    ("train", [d for d in documents if d not in held_out]),
    ("validation", held_out),
  ):
    files, examples = read_shards(output, split)
    assert [f.name for f in files] == [f"{split}-{i:05d}-of-00003.tfrecord" for i in range(3)]
    assert examples == [expected[i::3] for i in range(3)]


def test_strict_stops_at_an_unusable_document(corpus, tmp_path):
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
def test_bad_input_is_reported_in_one_line(tmp_path, flags, message):
  done = prepare(*flags, f"--output_dir={tmp_path}/x")
  assert done.returncode == 2 and not (tmp_path / "x").exists()
  assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}")


def test_one_document_cannot_be_split_and_leaves_no_shards(corpus, tmp_path):
  folder, _ = corpus
  done = prepare(f"--input={folder}/c.txt", f"--output_dir={tmp_path}/x", "--workers=1")
  assert done.returncode == 1
  error = done.stderr.splitlines()[-1]
  assert error.startswith("error: no document for the validation split: 1 in ")
  assert "--validation_fraction=0" in error and "--plain_text=paragraph" in error
  assert not list((tmp_path / "x").iterdir())


@pytest.fixture(scope="module")
def tool():
  """The module of the tool."""
  spec = importlib.util.spec_from_file_location("prepare_text", ROOT / "tools" / "prepare_text.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def write(tool, tmp_path, monkeypatch):
  """Returns a function that writes shards in this process.

  The function returns the (id, text) of each split, and the skipped documents.
  """

  def parse_all(config, kinds):
    bar = types.SimpleNamespace(update=lambda _: None)
    for file, kind in kinds.items():
      for block in tool.blocks(file, kind, bar):
        yield tool.parse(block, config.text_field, config.id_field)

  def written(*files, **options):
    config = tool.PrepareConfig(num_shards=1, workers=1, **options)
    kinds = {str(file): tool._kind(str(file), config.plain_text) for file in files}
    splits = ("train", "validation") if config.validation_fraction else ("train",)
    target = tmp_path / f"shards{len(list(tmp_path.iterdir()))}"
    _, skipped = tool.write(config, kinds, target, splits)
    return [read_shards(target, split)[1][0] for split in splits], skipped

  monkeypatch.setattr(tool, "parse_all", parse_all)
  return written


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
  ("plain_text", "content", "texts"),
  [
    ("file", BOM + b"one\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo\n\nthree"]),
    ("file", b"one\rtwo\r", ["one\ntwo"]),  # an old Mac's file
    ("file", b"a\x0bb\x0cc\xc2\x85d\xe2\x80\xa8e", ["a\x0bb\x0cc\x85d\u2028e"]),
    ("paragraph", BOM + b"one\r\ntwo\r\n\r\nthree\r\n", ["one\ntwo", "three"]),
    ("paragraph", b"one\rtwo\r\rthree", ["one\ntwo", "three"]),
    ("line", BOM + b"one\r\n \r\n two \n", ["one", " two "]),
    ("line", b"a\rb\x0bc\xc2\x85d\xe2\x80\xa8e\nf", ["a\rb\x0bc\x85d\u2028e", "f"]),
  ],
)
@pytest.mark.parametrize("encode", [bytes, gzip.compress, zstandard.compress])
def test_marks_and_line_ends_are_not_part_of_plain_documents(
  write, tmp_path, plain_text, content, texts, encode
):
  file = tmp_path / ("a.txt" + {bytes: "", gzip.compress: ".gz"}.get(encode, ".zst"))
  file.write_bytes(encode(content))
  (found,), _ = write(file, plain_text=plain_text, validation_fraction=0.0)
  assert [text for _, text in found] == texts


def test_rows_of_every_kind_of_file_become_documents(write, tmp_path):
  import datasets

  rows = [{"text": "p"}, {"text": None}, {"text": "r\u2028s"}]
  (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
  (tmp_path / "b.csv").write_bytes(BOM + b'text,id\r\n"1\r\n2",007\r\n')
  datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
  (tmp_path / "d.jsonl").write_bytes(BOM + b'{"text": "one"}\r\n{"text": "a\xe2\x80\xa8b"}')
  (tmp_path / "noending").write_bytes(gzip.compress(b'{"text": "last"}'))
  names = ("a.json", "b.csv", "c.parquet", "d.jsonl", "noending")
  (found,), skipped = write(*(tmp_path / name for name in names), validation_fraction=0.0)
  assert found == [
    ("a.json:2", "p"), ("a.json:8", "r\u2028s"), ("007", "1\r\n2"), ("c.parquet:1", "p"),
    ("c.parquet:3", "r\u2028s"), ("d.jsonl:1", "one"), ("d.jsonl:2", "a\u2028b"),
    ("noending:1", "last"),
  ]  # fmt: skip
  assert skipped.counts == {"field 'text' is not text": 2}


def test_rows_of_arrays_are_split_into_blocks(tool, write, tmp_path, monkeypatch):
  monkeypatch.setattr(tool, "_BLOCK", 50)
  rows = [{"text": f"text {i}"} for i in range(40)]
  (tmp_path / "a.json").write_text(json.dumps(rows))
  (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (found,), _ = write(tmp_path / "a.json", tmp_path / "b.jsonl", validation_fraction=0.0)
  assert [text for _, text in found] == [row["text"] for row in rows] * 2
  assert [identity for identity, _ in found[40:]] == [f"b.jsonl:{i + 1}" for i in range(40)]


@pytest.mark.parametrize("fraction", [0.5, 0.4, 0.3, 0.15, 0.1, 0.01, 0.003])
@pytest.mark.parametrize("count", [2, 3, 10, 99, 100, 250])
def test_the_held_out_fraction_is_exact(write, tmp_path, fraction, count):
  file = tmp_path / "a.txt"
  file.write_text("".join(f"{i}\n" for i in range(count)))
  (train, held_out), _ = write(file, plain_text="line", validation_fraction=fraction)
  # In hundredths of a per cent, so that the result does not depend on float rounding.
  exact = count * round(fraction * 10_000) // 10_000
  assert len(held_out) == max(1, exact)
  texts = [[text for _, text in split] for split in (train, held_out)]
  assert sorted(sum(texts, []), key=int) == [str(i) for i in range(count)]
  if exact:  # documents added later move none of the others
    file.write_text("".join(f"{i}\n" for i in range(count + 7)))
    (_, more), _ = write(file, plain_text="line", validation_fraction=fraction)
    assert [text for _, text in more][:exact] == texts[1]


def test_a_wide_encoding_is_refused_when_the_kind_is_determined(tool, tmp_path):
  file = tmp_path / "a.txt"
  file.write_bytes("text".encode("utf-16"))
  with pytest.raises(ValueError, match=f"^{file} is UTF-16: convert it with `iconv -f UTF-16 -t"):
    tool._kind(str(file), "file")
