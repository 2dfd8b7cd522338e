"""Missing tokenizers, and tokenizers with more ids than the embedding has rows.

tests/test_train_flags.py covers training.
"""

import json
import shutil

import pytest

from ll3m.hf.conversion import convert_model
from ll3m.hf.model_files import open_model
from tests.calling import call
from tests.faults.causing import PARITY

USING = {
  "evaluate": [
    "--eval_dataset.seqio_dataset.mixture_or_task_name=python_mixture",
    "--eval_dataset.seqio_dataset.task_feature_lengths=(8,)",
  ],
  "generate": ["--prompt=a"],
}
TOO_LARGE = "the tokenizer's vocabulary is larger than the embedding: 258 ids, 89 rows"


@pytest.fixture(scope="module")
def without(tmp_path_factory):
  """A published model without a tokenizer, and its converted folder."""
  folder = tmp_path_factory.mktemp("without")
  published = shutil.copytree(PARITY / "llama2", folder / "published")
  for file in published.glob("token*"):
    file.unlink()
  convert_model(open_model(published), folder / "converted")
  return folder


@pytest.fixture(scope="module")
def too_large(tmp_path_factory, byte_tokenizer):
  """A published model of 89 rows with a tokenizer of 258 ids, and its converted folder."""
  folder = tmp_path_factory.mktemp("too_large")
  shutil.copytree(PARITY / "llama2", folder / "published")
  shutil.copytree(byte_tokenizer, folder / "published", dirs_exist_ok=True)
  convert_model(open_model(folder / "published"), folder / "converted")
  return folder


@pytest.mark.parametrize("verb", USING)
def test_evaluating_and_generating_need_a_matching_tokenizer(without, too_large, verb):
  for folder, sentence in (
    (without, "error: a tokenizer is needed"),
    (too_large, f"error: {TOO_LARGE}"),
  ):
    done = call(verb, f"--checkpoint={folder / 'converted'}", *USING[verb])
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith(sentence), done.stderr


def test_converting_and_exporting_report_the_tokenizer(too_large, without, tmp_path):
  for verb, place, wanted in (
    ("convert", "checkpoint_dir", TOO_LARGE),
    ("export", "checkpoint", TOO_LARGE),
  ):
    source = {"convert": "published", "export": "converted"}[verb]
    done = call(verb, f"--{place}={too_large / source}", f"--output_dir={tmp_path / verb}")
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
    done = call(verb, f"--{place}={without / source}", f"--output_dir={tmp_path / 'w' / verb}")
    assert done.returncode == 0, done.stderr
    assert "no tokenizer" in done.stdout


def test_unreadable_tokenizer_is_exported_unchanged(tmp_path):
  published = shutil.copytree(PARITY / "llama2", tmp_path / "published")
  config = json.loads((published / "config.json").read_text())
  config = {key: value for key, value in config.items() if not key.endswith("_token_id")}
  (published / "config.json").write_text(json.dumps(config))
  (published / "tokenizer.json").write_text("{}")
  convert_model(open_model(published), tmp_path / "converted")
  done = call(
    "export", f"--checkpoint={tmp_path / 'converted'}", f"--output_dir={tmp_path / 'exported'}"
  )
  assert done.returncode == 0, done.stderr
  assert "the tokenizer" in done.stdout
  assert "token ids of its source: " in done.stderr
  assert (tmp_path / "exported" / "tokenizer.json").read_text() == "{}"
