"""What `data` names: files, folders, datasets and mixtures, found on disk."""

import datasets
import pytest

from ll3m.data import sources
from ll3m.data.config import DatasetConfig, SeqioDatasetConfig
from ll3m.data.dataset_spec import resolve
from ll3m.data.sources import ShardFolder, Source
from tests.data.opening import open_dataset


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def touch(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()


def files_of(data, split="train"):
  return [source.files for source in sources.find(data, split_default=split)]


@pytest.mark.parametrize(
  ("data", "expected"),
  [
    ("a.jsonl", [("a.jsonl", None)]),
    ("a.jsonl,b/*.csv", [("a.jsonl", None), ("b/*.csv", None)]),
    ("a.jsonl=0.7, b.csv=3", [("a.jsonl", 0.7), ("b.csv", 3.0)]),
    ("x/y:train[:10%],z{1,2}.json", [("x/y:train[:10%]", None), ("z{1,2}.json", None)]),
    ("gs://b/a=1e-1", [("gs://b/a", 0.1)]),
  ],
)
def test_names_and_weights_are_separated(here, data, expected):
  assert sources.parse(data) == expected


def test_existing_names_may_hold_commas_and_equals_signs(here):
  touch(here, "a,b=1.jsonl", "c=2")
  assert sources.parse("a,b=1.jsonl") == [("a,b=1.jsonl", None)]
  assert sources.parse("c=2") == [("c=2", None)]


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ("a.jsonl,,b.jsonl", "empty name"),
    ("a.jsonl=0,b.jsonl=1", "weight in a.jsonl=0 must be a positive number"),
    ("a.jsonl=-1,b.jsonl=1", "must be a positive number, got '-1'"),
    ("a.jsonl=inf,b.jsonl=1", "must be a positive number"),
    ("a.jsonl=x,b.jsonl=1", "must be a positive number, got 'x'"),
    ("a.jsonl=1,b.jsonl", "b.jsonl has no weight"),
  ],
)
def test_malformed_names_and_weights_are_refused(here, data, message):
  with pytest.raises(ValueError, match=f"`data`.*{message}"):
    sources.parse(data)


def test_folders_hold_files_of_rows_by_split(here):
  touch(here, "plain/a.jsonl", "plain/sub/b.csv.gz", "plain/README.md", "plain/.hidden/c.jsonl",
        "plain/config.json")  # fmt: skip
  assert files_of("plain") == [("plain/a.jsonl", "plain/sub/b.csv.gz")]
  touch(here, "split/data/train-00000-of-00001.parquet", "split/data/test-00000-of-00001.parquet",
        "split/dev.jsonl", "split/README.md")  # fmt: skip
  assert files_of("split") == [("split/data/train-00000-of-00001.parquet",)]
  assert files_of("split:test") == [("split/data/test-00000-of-00001.parquet",)]
  assert files_of("split", "validation") == [("split/dev.jsonl",)]
  with pytest.raises(ValueError, match="has the splits test, train, validation, not 'tset'"):
    files_of("split:tset")
  with pytest.raises(ValueError, match="plain has no splits, not 'test'"):
    files_of("plain:test")
  touch(here, "texts/a.txt", "texts/b.md")
  assert files_of("texts") == [("texts/a.txt", "texts/b.md")]
  touch(here, "images/a.png")
  with pytest.raises(FileNotFoundError, match="images holds no file of the kinds"):
    files_of("images")


def test_saved_datasets_are_read_from_their_arrow_files(here, tokenizer):
  rows = datasets.Dataset.from_dict({"text": ["if x", "for y", "while z"]})
  rows.save_to_disk("one")
  datasets.DatasetDict({"train": rows, "test": rows.select([2, 0])}).save_to_disk("many")

  def texts(data):
    options = SeqioDatasetConfig(batch_size=1, task_feature_lengths=(16,), pack=False)
    stream = open_dataset(
      DatasetConfig(data=data, seqio_dataset=options), tokenizer, rows=[0], repeat=False
    )
    return [tokenizer.decode(b.inputs[0][b.segment_ids[0] > 0]) for b in stream]

  assert texts("one") == ["if x", "for y", "while z"]
  assert texts("many:test") == ["while z", "if x"]
  assert texts("one,many:test") == ["if x", "for y", "while z", "while z", "if x"]
  with pytest.raises(ValueError, match="many has the splits test, train, not 'validation'"):
    files_of("many", "validation")
  (here / "one" / "data-00000-of-00001.arrow").unlink()
  with pytest.raises(FileNotFoundError, match=r"data-00000-of-00001\.arrow is missing"):
    files_of("one")
  (here / "one" / "state.json").write_text("{}")
  with pytest.raises(ValueError, match=r"state\.json is damaged"):
    files_of("one")


@pytest.mark.parametrize(
  ("data", "expected"),
  [
    ("user/name", ("user/name", None, "train")),
    ("squad", ("squad", None, "train")),
    ("user/name:test", ("user/name", None, "test")),
    ("user/name:en:test", ("user/name", "en", "test")),
    ("user/name:train[:10%]", ("user/name", None, "train[:10%]")),
    ("user/name:en:train[5:9]", ("user/name", "en", "train[5:9]")),
  ],
)
def test_other_names_are_those_of_hugging_face(here, data, expected):
  assert sources.find(data, split_default="train") == [Source(data, hub=expected)]


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ("alpca.json", r"no such file or folder: alpca\.json; did you mean alpaca\.json"),
    ("./nowhere", "no such file or folder: ./nowhere$"),
    ("a b c", "a b c is neither a file or folder nor the name"),
    ("a/b/c/d", "a/b/c/d is neither a file or folder nor the name"),
    ("*.nothing", "no file matches"),
  ],
)
def test_what_does_not_exist_is_named_with_the_nearest_name(here, data, message):
  touch(here, "alpaca.json")
  with pytest.raises(FileNotFoundError, match=f"^`data`: {message}"):
    sources.find(data, split_default="train")


def test_shards_and_mixtures_stand_alone(here):
  touch(here, "data/wiki/train-00000-of-00001.tfrecord", "a.jsonl")
  assert sources.find("data/wiki", split_default="train") == ShardFolder("data", "wiki")
  spec = resolve(DatasetConfig(data="data/wiki"))
  assert spec.files == {"wiki": ["data/wiki/train-00000-of-00001.tfrecord"]}
  assert spec.config.type == "seqio" and not spec.is_rows and spec.data_dir == "data"
  mixture = resolve(DatasetConfig(data="mixture:python_mixture"))
  assert mixture.config.seqio_dataset.mixture_or_task_name == "python_mixture"
  assert mixture.config.seqio_dataset.num_shards == 8
  for data in ("data/wiki,a.jsonl", "data/wiki=1", "mixture:python_mixture,a.jsonl"):
    with pytest.raises(ValueError, match="cannot be weighted or combined"):
      resolve(DatasetConfig(data=data))
  with pytest.raises(ValueError, match="unknown mixture .*did you mean 'python_mixture'"):
    resolve(DatasetConfig(data="mixture:python_mixtur"))
  with pytest.raises(ValueError, match="give the folder of TFRecord shards"):
    sources.find("data/wiki/*", split_default="train")
  with pytest.raises(ValueError, match="`eval_fraction` needs data whose rows are known"):
    resolve(DatasetConfig(data="data/wiki"), eval_fraction=0.1)
