"""Token ids in config.json and generation_config.json. transformers reads the exported files."""

import json
import shutil

import pytest
import transformers
from etils import epath

from ll3m.core import checkpoint
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
from ll3m.data.tokenizer_files import read_tokenizer_files
from ll3m.hf import conversion, exporting
from ll3m.hf.model_files import open_model
from ll3m.hf.token_settings import retarget_settings
from tests.data import tokenizer_folders as folders


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
  """A tokenizer with different tokens for the end of a turn (id 700) and of a text (id 2)."""
  encoder = folders.train_byte_level(["<unk>", "<s>", "</s>"])
  encoder.add_tokens([*folders.MARKERS])
  settings = folders.LLAMA | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": folders.CHATML,
    "pad_token": "<unk>",
  }
  return folders.write(tmp_path_factory.mktemp("chatml"), encoder, settings)


def write_json(file, value):
  file.write_text(json.dumps(value))


@pytest.mark.parametrize(
  ("config_ends", "generation", "expected"),
  [
    (None, None, [2, "end"]),
    (2, None, [2, "end"]),
    ([2, 7], None, [2, 7, "end"]),
    ([2, 7], {"eos_token_id": 5}, [5, 2, "end"]),  # generation_config.json takes precedence
    (5, {"eos_token_id": [2, 9], "temperature": 0.5, "top_k": 3}, [2, 9, "end"]),
  ],
)
def test_an_exported_model_has_the_same_stop_tokens(
  make_tiny, chatml, tmp_path, config_ends, generation, expected
):
  tiny = make_tiny(vocab_size=720)
  for file in chatml.iterdir():
    shutil.copy(file, tiny.folder)
  config = json.loads((tiny.folder / "config.json").read_text())
  config |= {} if config_ends is None else {"eos_token_id": config_ends}
  write_json(tiny.folder / "config.json", config)
  if generation is not None:
    write_json(tiny.folder / "generation_config.json", generation)
  conversion.convert_model(open_model(tiny.folder), tmp_path / "converted")
  found = checkpoint.open_checkpoint(tmp_path / "converted")
  exporting.export_checkpoint(found, tmp_path / "exported")
  ours = load_tokenizer(
    TokenizerConfig(), checkpoint_dir=found.tokenizer_dir, source_dir=found.source_dir
  )
  theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "exported")
  end = ours.token_id("<|im_end|>")
  ends = [end if e == "end" else e for e in expected]
  assert theirs.eos_token_id == ends
  assert ours.stop_ids == set(ends)
  assert (theirs.bos_token_id, theirs.pad_token_id) == (1, 0)
  for key in ("temperature", "top_k"):
    assert getattr(theirs, key) == (generation or {}).get(key)


def test_a_new_tokenizer_replaces_all_settings_of_the_old_one(chatml, tmp_path):
  folder = epath.Path(tmp_path)
  write_json(folder / "config.json", {"eos_token_id": 99, "decoder_start_token_id": 9, "d": 1})
  write_json(
    folder / "generation_config.json",
    {"eos_token_id": [99, 98], "suppress_tokens": [4], "stop_strings": ["x"], "top_p": 0.9},
  )
  tokenizer = load_tokenizer(TokenizerConfig(path=str(chatml)))
  retarget_settings(folder, tokenizer)
  ids = {
    "bos_token_id": 1, "eos_token_id": [2, tokenizer.token_id("<|im_end|>")], "pad_token_id": 0,
  }  # fmt: skip
  assert json.loads((folder / "config.json").read_text()) == {"d": 1} | ids
  assert json.loads((folder / "generation_config.json").read_text()) == {"top_p": 0.9} | ids


def test_a_tokenizer_given_by_path_uses_its_own_stop_ids(chatml, tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  write_json(source / "generation_config.json", {"eos_token_id": 7})
  own = {"checkpoint_dir": chatml, "source_dir": source}
  end = load_tokenizer(TokenizerConfig(), **own).token_id("<|im_end|>")
  assert load_tokenizer(TokenizerConfig(), **own).stop_ids == {2, 7, end}
  assert load_tokenizer(TokenizerConfig(path=str(chatml)), **own).stop_ids == {2, end}
  whole = shutil.copytree(chatml, tmp_path / "whole")  # a model's folder has its own config.json
  write_json(whole / "config.json", {"eos_token_id": 9})
  assert load_tokenizer(TokenizerConfig(path=str(whole)), **own).stop_ids == {2, 9, end}


def test_an_exported_sentencepiece_model_tokenises_like_the_original(make_tiny, tmp_path):
  tiny = make_tiny(vocab_size=800)
  serialized = folders.train_sentencepiece(
    model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False,
  )  # fmt: skip
  (tiny.folder / "tokenizer.model").write_bytes(serialized)
  conversion.convert_model(open_model(tiny.folder), tmp_path / "converted")
  found = checkpoint.open_checkpoint(tmp_path / "converted")
  exporting.export_checkpoint(found, tmp_path / "exported")
  assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == serialized
  model = folders.sentencepiece.SentencePieceProcessor(model_proto=serialized)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
  for text in (" leading", "  two", "*" * 19, "a", "漢字"):
    assert theirs(text)["input_ids"] == [model.bos_id(), *model.encode(text)]


@pytest.mark.parametrize(
  "name", ["llama2_legacy", "chatml_in_config", "sentencepiece", "fast_only"]
)
def test_a_converted_tokenizer_folder_is_unambiguous(make_tiny, tmp_path, name):
  """It tokenises like the published folder in transformers, and is read without transformers."""
  tiny = make_tiny(vocab_size=32_010, num_layers=1)
  config = json.loads((tiny.folder / "config.json").read_text())
  if name == "sentencepiece":
    folders.sentencepiece_only(tiny.folder, folders.mistral_model(), chatml=True)
  else:
    folders.FOLDERS[name](tiny.folder)
  ids = json.loads((tiny.folder / "config.json").read_text()).get("eos_token_id", 2)
  write_json(tiny.folder / "config.json", config | {"model_type": "llama", "eos_token_id": ids})
  published = load_tokenizer(TokenizerConfig(), checkpoint_dir=tiny.folder, source_dir=tiny.folder)
  conversion.convert_model(open_model(tiny.folder), tmp_path / "converted")
  folder = tmp_path / "converted" / "tokenizer"
  assert read_tokenizer_files(epath.Path(folder)).as_found
  ours = load_tokenizer(
    TokenizerConfig(), checkpoint_dir=folder, source_dir=tmp_path / "converted" / "hf"
  )
  assert (ours.fingerprint, ours.stop_ids) == (published.fingerprint, published.stop_ids)
  assert (folder / "tokenizer.model").exists() == (tiny.folder / "tokenizer.model").exists()
  if name != "sentencepiece":
    theirs = transformers.AutoTokenizer.from_pretrained(tiny.folder)
    for text in ("  two", " a", "x</s>", "漢字 \n", "In 2023"):
      expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
      assert ours.encode(text) == expected
