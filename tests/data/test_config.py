"""Checks of the options, which run before slow imports."""

import dataclasses
import subprocess
import sys

import pytest

from ll3m.data import config, mixtures
from ll3m.data.config import DatasetConfig, SeqioDatasetConfig, TextField, parse_fields
from ll3m.data.dataset_spec import resolve


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    ("", ()),
    ("text", ((("text",), True),)),
    ("[prompt],answer", ((("prompt",), False), (("answer",), True))),
    (" [ system + prompt ] , answer ", ((("system", "prompt"), False), (("answer",), True))),
    ("[a,b+c],d", ((("a",), False), (("b", "c"), False), (("d",), True))),
    ("a,[b],c", ((("a",), True), (("b",), False), (("c",), True))),
  ],
)
def test_fields_are_parsed(spec, expected):
  assert parse_fields(spec) == tuple(TextField(*field) for field in expected)


@pytest.mark.parametrize("spec", ["[a,b", "a]", "[a],[b]", "a,,b", "a+,b", "[[a]],b", "a[b],c"])
def test_invalid_fields_are_refused(spec):
  with pytest.raises(ValueError, match="^`fields` "):
    parse_fields(spec)


def seqio_dataset(name, **kwargs) -> DatasetConfig:
  return DatasetConfig(seqio_dataset=SeqioDatasetConfig(mixture_or_task_name=name, **kwargs))


def test_mixtures_have_the_rates_of_the_recipe():
  assert mixtures.MIXTURES["wikipedia_mixture"] == (("cc_en", 9.09), ("wiki", 90.91))
  assert dict(mixtures.MIXTURES["dolma_mixture"]) == {
    "cc_en": 46.23, "stack": 21.37, "c4": 16.19, "reddit": 6.94, "peS2o": 5.49, "books": 2.10,
    "wiki": 1.66,
  }  # fmt: skip
  assert dict(mixtures.MIXTURES["python_mixture"]) == {
    "python_reference": 90.91,
    "package_descriptions": 9.09,
  }


@pytest.mark.parametrize(
  ("dataset", "message"),
  [
    (seqio_dataset("wikipedia_mixure"), "unknown mixture .*did you mean 'wikipedia_mixture'"),
    (seqio_dataset(None), "^`seqio_dataset.mixture_or_task_name`.* must be given for"),
    (seqio_dataset("python_mixture", split="test"), "train, validation, got 'test'"),
    (DatasetConfig(type="json"), "^`json_dataset.path` must be given .*json"),
    (DatasetConfig(type="huggingface"), "^`huggingface_dataset.path` must be given"),
  ],
)
def test_datasets_that_cannot_be_read_are_refused(dataset, message):
  with pytest.raises(ValueError, match=message):
    resolve(dataset)


def test_missing_files_are_named(tmp_path, monkeypatch):
  wiki = seqio_dataset("wiki")
  with pytest.raises(FileNotFoundError, match="`data_dir` .*nowhere does not exist"):
    resolve(wiki, data_dir=str(tmp_path / "nowhere"))
  monkeypatch.setenv("LL3M_DATA_DIR", str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"expected 32 shards .*wiki/train-.*found 0"):
    resolve(wiki)
  (tmp_path / "wiki").mkdir()
  for i in (0, 2):
    (tmp_path / "wiki" / f"train-{i:05d}-of-00003.tfrecord").touch()
  with pytest.raises(FileNotFoundError, match="expected 3 shards .*found 2, 00001 is missing"):
    resolve(wiki)
  (tmp_path / "wiki" / "train-00001-of-00003.tfrecord").touch()
  resolve(wiki)
  with pytest.raises(FileNotFoundError, match="validation-00000"):
    resolve(wiki, is_evaluation=True)
  json_lines = DatasetConfig(
    type="json", json_dataset=config.JsonDatasetConfig(path=str(tmp_path / "*.jsonl"))
  )
  with pytest.raises(FileNotFoundError, match=r"^`json_dataset.path`: no file matches .*\*.jsonl"):
    resolve(json_lines)


@pytest.mark.parametrize(
  "options",
  [
    {"batch_size": 0},
    {"num_shards": 0},
    {"task_feature_lengths": (8, 8)},
    {"task_feature_lengths": (1,)},
    {"task_feature_lengths": (0,)},
    {"task_feature_field": ()},
  ],
)
def test_invalid_sizes_are_refused(options):
  with pytest.raises(ValueError, match=f"^`({'|'.join(options)}|task_feature_lengths)` must"):
    dataclasses.replace(SeqioDatasetConfig(), **options)


def test_options_and_tokenizers_load_without_tensorflow():
  program = (
    "import sys; import ll3m.data.config, ll3m.data.tokenizer_files, ll3m.data.chat, "
    "ll3m.data.gin_settings, ll3m.data.batching; "
    "assert not {'tensorflow', 'seqio', 'transformers', 'torch'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", program], check=True)
