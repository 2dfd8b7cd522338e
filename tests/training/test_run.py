"""Tokenizer and config files that a run saves beside its checkpoints; `show_batches`."""

import importlib.util
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from ll3m import families
from ll3m.core import sharding
from ll3m.core.checkpoint_manager import CheckpointerConfig
from ll3m.data.config import DatasetConfig, SeqioDatasetConfig, TokenizerConfig
from ll3m.data.dataset_spec import resolve
from ll3m.data.tokenizer import load_tokenizer
from ll3m.hf.conversion import convert_model
from ll3m.hf.model_files import open_model
from ll3m.hf.model_source import open_source
from ll3m.training.config import TrainOptions
from ll3m.training.logger import LoggerConfig
from ll3m.training.optimizer import OptimizerConfig
from ll3m.training.run import Run, show_batches, write_companions

FIXTURE = Path(__file__).parents[1] / "fixtures" / "parity" / "llama2"


@pytest.fixture(scope="module")
def pieces() -> Path:
  """Path of a SentencePiece model."""
  (package,) = importlib.util.find_spec("mistral_common").submodule_search_locations
  return Path(package) / "data" / "tokenizer.model.v1"


@pytest.fixture(params=["published", "converted"])
def make_source(request, tmp_path):
  """Returns a function that opens a model together with some tokenizer files."""

  def make(files):
    folder = shutil.copytree(FIXTURE, tmp_path / "published")
    for name, content in files.items():
      (folder / name).write_bytes(content)
    if request.param == "published":
      return open_source(f"hf::{folder}")
    convert_model(open_model(folder), tmp_path / "converted")
    return open_source(str(tmp_path / "converted"))

  return make


def leave(source, config, output):
  tokenizer = load_tokenizer(config, checkpoint_dir=source and source.tokenizer_dir)
  family, model = families.get_preset("llama2_7b")
  write_companions(
    Run(
      options=TrainOptions(),
      optimizer=OptimizerConfig(),
      checkpointer=CheckpointerConfig(),
      logger=LoggerConfig(str(output)),
      train_data=resolve(DatasetConfig(seqio_dataset=SeqioDatasetConfig("python_mixture"))),
      eval_dataset=DatasetConfig(),
      eval_data=None,
      load_kind=None,
      source=source,
      resumed=None,
      dataset_state={},
      family=family,
      config=model,
      tokenizer=tokenizer,
      tokenizer_config=config,
      mesh=sharding.make_mesh("-1,1,1"),
      settings={},
    )
  )
  return tokenizer


@pytest.mark.parametrize("own", ["json", "pieces"])
@pytest.mark.parametrize("asked", ["own", "json", "pieces", "own and more"])
def test_a_run_saves_the_tokenizer_that_it_used(
  make_source, byte_tokenizer, pieces, tmp_path, own, asked
):
  json_files = {file.name: file.read_bytes() for file in byte_tokenizer.iterdir()}
  files = {
    "json": json_files | {"chat_template.jinja": b"the source's"},
    "pieces": {"tokenizer.model": pieces.read_bytes()},
  }
  source = make_source(files[own])
  config = {
    "own": TokenizerConfig(),
    "json": TokenizerConfig(path=str(byte_tokenizer)),
    "pieces": TokenizerConfig(path=str(pieces)),
    "own and more": TokenizerConfig(extra_tokens=("<image>",)),
  }[asked]
  # An earlier attempt in the same folder used the other kind of tokenizer.
  other = pieces if own == "json" else byte_tokenizer
  leave(None, TokenizerConfig(path=str(other)), tmp_path / "run")
  used = leave(source, config, tmp_path / "run")
  again = load_tokenizer(TokenizerConfig(), checkpoint_dir=tmp_path / "run" / "tokenizer")
  assert (again.fingerprint, again.chat_template) == (used.fingerprint, used.chat_template)
  config = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
  if asked in ("json", "pieces"):  # the source's ids would be wrong for this tokenizer
    assert config["eos_token_id"] == used.eos_id
  else:
    assert config == json.loads((source.source_dir / "config.json").read_text())


def test_showing_batches_does_not_advance_the_stream(byte_tokenizer, tmp_path, capsys):
  from ll3m.data import loaders

  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
  tokenizer = load_tokenizer(TokenizerConfig(path=str(byte_tokenizer)))
  shown, fresh = (loaders.jsonl(rows, tokenizer, batch_size=2, length=16) for _ in range(2))
  run = mock.create_autospec(Run, instance=True)
  run.tokenizer, run.options = tokenizer, TrainOptions(show_batches=3)
  show_batches(run, shown)
  assert capsys.readouterr().out.count("== batch") == 3
  for _ in range(4):
    for ours, theirs in zip(next(shown), next(fresh), strict=True):
      assert np.array_equal(ours, theirs)
