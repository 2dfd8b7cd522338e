"""`ll3m.load` and `Model`. Oracles: the fixtures of transformers, and the engine."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import ll3m
from ll3m.data import chat
from ll3m.hf import conversion
from ll3m.hf.model_files import open_model
from tests.successor_model import write_successor_model
from tests.test_generate_ends import MARKERS, TEMPLATE, write_words

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """A model with a chat template that generates "go one two three" and stops."""
  folder = tmp_path_factory.mktemp("published")
  write_words(folder, markers=MARKERS, settings={"chat_template": TEMPLATE})
  chain = {3: 4, 4: 6, 6: 7, 7: 2, 9: 6}  # go one two three </s>; assistant two
  write_successor_model(folder, 16, chain)
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 7}))
  return folder


@pytest.fixture(scope="module")
def model(published):
  return ll3m.load(published)


@pytest.mark.parametrize("name", ["llama2", "gemma_2b", "phi_2"])
def test_logits_match_transformers(name):
  expected = np.load(PARITY / name / "expected.npz")
  logits = ll3m.load(PARITY / name).logits(expected["tokens"])
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(
    logits, expected["logits"], atol=6e-6 * np.abs(expected["logits"]).max()
  )


def test_generates_from_every_kind_of_prompt(model):
  assert model.generate("go", max_new_tokens=9) == " one two three"
  assert model.generate("go", max_new_tokens=2) == " one two"
  assert model.generate(["go", "go one"], max_new_tokens=9) == [" one two three", " two three"]
  assert list(model.generate("go", max_new_tokens=9, stream=True)) == [" one", " two", " three"]
  turn = [{"role": "user", "content": "go"}]
  assert model.generate(turn, max_new_tokens=9) == " two three"
  assert chat.encode_prompt(model.tokenizer, turn)[-1] == 9
  assert model.tokenizer("go") == [1, 3]
  drawn = {model.generate("go", max_new_tokens=4, temperature=50.0, seed=i) for i in range(5)}
  assert len(drawn) > 1
  for bad, message in (
    ({"stream": True, "prompt": ["go"]}, "a single prompt"),
    ({"prompt": "go", "max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
    ({"prompt": "go", "temperature": -1.0}, "temperature"),
  ):
    with pytest.raises(ValueError, match=message):
      model.generate(**bad)


@pytest.mark.parametrize("form", ["published", "prefixed", "converted", "saved", "saved again"])
def test_every_source_gives_the_same_model(published, model, tmp_path, form):
  path = published
  if form == "prefixed":
    path = f"hf::{published}"
  elif form == "converted":
    path = tmp_path / "checkpoints" / "mine"
    conversion.convert_model(open_model(published), path)
  elif form.startswith("saved"):
    path = tmp_path / "saved"
    model.save(path)
    if form == "saved again":
      ll3m.load(path).save(tmp_path / "again")
      path = tmp_path / "again"
  found = ll3m.load(path)
  assert (found.config, found.family) == (model.config, "llama")
  assert jax.tree.all(jax.tree.map(np.array_equal, found.params, model.params))
  assert found.tokenizer.stop_ids == model.tokenizer.stop_ids
  assert found.source_files.keys() == {"config.json", "generation_config.json"}
  assert found.generate("go", max_new_tokens=9) == " one two three"


def test_export_restores_the_published_files(published, model, tmp_path):
  model.export_hf(tmp_path / "exported")
  ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "exported", published))
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
  generation = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
  assert generation["top_k"] == 7 and set(generation["eos_token_id"]) == {2, 11}


def test_save_never_overwrites_files(model, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("keep")
  with pytest.raises(ValueError, match="the output folder"):
    model.save(tmp_path / "mine")
  assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
  model.save(tmp_path / "other")
  chunk = next((tmp_path / "other" / "params").rglob("*"))
  (tmp_path / "other" / "ll3m.json").unlink()
  with pytest.raises(ValueError, match="complete checkpoint"):
    ll3m.load(tmp_path / "other")
  assert chunk.exists()


def test_load_rejects_a_damaged_model(model, tmp_path):
  model.save(tmp_path / "mine")
  file = max(
    (tmp_path / "mine" / "params").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size
  )
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match="checksum"):
    ll3m.load(tmp_path / "mine")


def test_parameters_are_sharded_over_the_given_mesh(published, model):
  split = ll3m.load(published, mesh="1,4,2", dtype="bfloat16", param_dtype="bfloat16")
  weight = split.params["layers/mlp/up"]["w"]
  assert weight.dtype == jnp.bfloat16 and len(weight.sharding.device_set) == 8
  assert weight.sharding.shard_shape(weight.shape) == (1, 16, 4)
  assert split.generate(["go"] * 4, max_new_tokens=9) == [" one two three"] * 4


def test_init_creates_a_random_model_of_a_preset(published):
  small = {"num_layers": 2, "d_model": 16, "d_ff": 8, "num_heads": 2, "num_kv_heads": 2,
           "head_dim": 8, "vocab_size": 16}  # fmt: skip
  model = ll3m.init("llama2_7b", seed=3, tokenizer=published, **small)
  again = ll3m.init("llama2_7b", seed=3, **small)
  assert jax.tree.all(jax.tree.map(np.array_equal, model.params, again.params))
  assert model.config.num_layers == 2 and model.tokenizer.eos_id == 2
  with pytest.raises(ValueError, match="the model has no tokenizer"):
    again.generate("go")
  with pytest.raises(ValueError, match="family must be one of"):
    ll3m.init(model.config)


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    ({"path": "nowhere"}, FileNotFoundError, "nowhere"),
    ({"dtype": "int8"}, ValueError, "dtype must be float32, bfloat16 or float16, got 'int8'"),
    ({"mesh": "3,1,1"}, ValueError, "3"),
    ({"tokenizer": "nowhere"}, FileNotFoundError, "tokenizer .*'nowhere'"),
  ],
)
def test_load_reports_invalid_arguments(published, options, error, message):
  with pytest.raises(error, match=message):
    ll3m.load(options.pop("path", published), **options)


def test_load_rejects_an_empty_folder(tmp_path):
  shutil.rmtree(tmp_path / "x", ignore_errors=True)
  (tmp_path / "x").mkdir()
  with pytest.raises(ValueError, match="complete checkpoint"):
    ll3m.load(tmp_path / "x")
