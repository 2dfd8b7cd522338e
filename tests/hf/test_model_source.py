"""Oracle: the tensors that the safetensors library wrote."""

import gc
import json

import jax
import numpy as np
import pytest
import tokenizers
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ll3m.hf import conversion, model_source
from ll3m.hf.model_files import open_model


@pytest.fixture
def tiny(make_tiny):
  tiny = make_tiny("llama2_7b", np.float32, d_ff=24)
  (tiny.folder / "tokenizer.json").write_text("{}")
  return tiny


@pytest.fixture(params=["published", "hf", "converted"])
def source(request, tiny, tmp_path):
  """The same model, published and converted."""
  if request.param != "converted":
    return model_source.open_source("hf::" * (request.param == "hf") + str(tiny.folder))
  conversion.convert_model(open_model(tiny.folder), tmp_path / "converted")
  return model_source.open_source(str(tmp_path / "converted"))


def expected_up(tiny):
  layers = range(tiny.config.num_layers)
  return np.stack([tiny.tensors[f"model.layers.{i}.mlp.up_proj.weight"].T for i in layers])


def test_knows_the_model_before_reading_it(source, tiny):
  assert (source.family, source.config, source.step) == ("llama", tiny.config, None)
  assert (source.tokenizer_dir / "tokenizer.json").exists()
  assert (source.source_dir / "config.json").exists()


def test_loads_to_one_device(source, tiny):
  params = source.load_params()
  np.testing.assert_array_equal(params["layers/mlp/up"]["w"], expected_up(tiny))
  np.testing.assert_array_equal(
    params["embed"]["embedding"], tiny.tensors["model.embed_tokens.weight"]
  )
  np.testing.assert_array_equal(params["head"]["w"], tiny.tensors["lm_head.weight"].T)
  for leaf in jax.tree.leaves(params):
    assert isinstance(leaf, jax.Array) and leaf.devices() == {jax.local_devices()[0]}


@pytest.mark.parametrize("spec", [(None, "x", "y"), (None, "y"), (None, None, ("x", "y")), ()])
def test_loads_the_shard_of_each_device(source, tiny, spec):
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
  everywhere = NamedSharding(mesh, PartitionSpec())
  shardings = jax.tree.map(lambda leaf: everywhere, source.load_params())
  shardings["layers/mlp/up"]["w"] = NamedSharding(mesh, PartitionSpec(*spec))
  params = source.load_params(dtype="bfloat16", shardings=shardings)
  up = params["layers/mlp/up"]["w"]
  assert up.sharding == shardings["layers/mlp/up"]["w"]
  np.testing.assert_array_equal(up, expected_up(tiny).astype(up.dtype))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_device_reads_only_its_own_shard(tiny):
  """A matrix is split over two pairs of devices; each half is read exactly once."""
  model = open_model(tiny.folder)
  name = "model.layers.1.mlp.up_proj.weight"  # [F, D] = [24, 12]
  read, seen = model.tensors[name].read, []
  counting = type(model.tensors[name])(
    (24, 12), np.dtype(np.float32), lambda index: seen.append(index) or read(index), tiny.folder
  )
  model.tensors[name] = counting
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
  shardings = {}
  for module, leaves in open_model(tiny.folder).load_params().items():
    shardings[module] = {leaf: NamedSharding(mesh, PartitionSpec()) for leaf in leaves}
  shardings["layers/mlp/up"]["w"] = NamedSharding(mesh, PartitionSpec(None, None, "x"))
  model.load_params(shardings=shardings)
  assert sorted(seen, key=str) == [
    (slice(0, 12, 1), slice(0, 12, 1)),
    (slice(12, 24, 1), slice(0, 12, 1)),
  ]


def test_saves_companion_files(source, tmp_path):
  output = epath.Path(tmp_path / "run")
  source.save_companions(output)
  assert [f.name for f in (output / "tokenizer").iterdir()] == ["tokenizer.json"]
  assert [f.name for f in (output / "hf").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("d_ff", 16, r"mlp/up/w \(expected .*16\), got .*24\)\)"),
    ("head_dim", 6, r"attention/query/w \(expected \(3, 12, 18\), got \(3, 12, 12\)\)"),
    ("num_kv_heads", 3, r"attention/key/w \(expected \(3, 12, 12\), got \(3, 12, 4\)\)"),
    ("vocab_size", 38, r"embed/embedding \(expected \(38, 12\), got \(37, 12\)\)"),
    ("num_layers", 2, r"attention/key/w \(expected \(2, 12, 4\), got \(3, 12, 4\)\)"),
    ("tie_embeddings", True, r"\(1\): head/w \(expected none, got \("),
  ],
)
def test_parameters_must_match_the_config(tiny, tmp_path, field, value, message):
  conversion.convert_model(open_model(tiny.folder), tmp_path / "converted")
  manifest = tmp_path / "converted" / "ll3m.json"
  meta = json.loads(manifest.read_text())
  assert meta["config"][field] != value
  meta["config"][field] = value
  manifest.write_text(json.dumps(meta))
  with pytest.raises(ValueError, match=f"does not match its config .*{message}"):
    model_source.open_source(str(tmp_path / "converted"), verify=False).load_params()


def test_a_gguf_tokenizer_folder_exists_as_long_as_the_model(smollm2_gguf):
  for name in (str(smollm2_gguf), str(smollm2_gguf.parent), f"hf::{smollm2_gguf}"):
    source = model_source.open_source(name)
    assert (source.family, source.config.num_layers, source.step) == ("llama", 30, None)
  folder = source.tokenizer_dir
  found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  assert (
    found.token_to_id("<|im_end|>") == 2 and found.decode(found.encode("It is.").ids) == "It is."
  )
  assert json.loads((source.source_dir / "config.json").read_text())["num_hidden_layers"] == 30
  del source
  gc.collect()
  assert not folder.exists()


def test_reports_a_path_without_a_model(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file or folder: absent"):
    model_source.open_source("hf::absent")
  with pytest.raises(FileNotFoundError, match="no checkpoint at /.*/absent"):
    model_source.open_source("absent")
  with pytest.raises(ValueError, match="complete checkpoint"):
    model_source.open_source(str(tmp_path))
