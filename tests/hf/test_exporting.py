import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from transformers import AutoConfig

from ll3m import families
from ll3m.core import checkpoint, checkpoint_manager, parameter_store
from ll3m.hf import conversion, exporting
from ll3m.hf.model_files import open_model

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


@pytest.fixture
def output(tmp_path):
  return tmp_path / "exported"


@pytest.fixture
def convert(tmp_path):
  def convert(tiny):
    conversion.convert_model(open_model(tiny.folder), tmp_path / "converted")
    return checkpoint.open_checkpoint(tmp_path / "converted")

  return convert


@pytest.mark.parametrize(
  ("preset", "changes"),
  [
    ("llama2_7b", {}),
    ("smollm2_135m", {}),
    ("mistral_7b", {"sliding_window": 5}),
    ("gemma_2b", {}),
    ("phi_2", {"head_dim": 10, "d_model": 30, "num_kv_heads": 3}),
  ],
)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_export_inverts_conversion_bitwise(make_tiny, convert, output, preset, changes, dtype):
  tiny = make_tiny(preset, dtype, **changes)
  done = exporting.export_checkpoint(convert(tiny), output)
  expected, found = (load_file(f / "model.safetensors") for f in (tiny.folder, output))
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
    assert found[name].tobytes() == values.tobytes(), name
  assert (done.tensors, done.dtypes) == (len(expected), (np.dtype(dtype).name,))
  assert not list(output.glob("*.index.json"))  # a single file has no index
  config = json.loads((output / "config.json").read_text())
  assert families.from_hf_config(config) == (tiny.family, tiny.config)
  assert config["bos_token_id"] == 1 and config["eos_token_id"] == 2
  assert AutoConfig.from_pretrained(output).dtype == np.dtype(dtype).name
  assert not list(output.parent.glob(".*"))


@pytest.mark.parametrize("name", sorted(path.name for path in PARITY.iterdir()))
def test_export_of_every_family_keeps_tensors_and_config(convert, output, name):
  """The fixtures have the keys of published files, in both spellings."""
  model = open_model(PARITY / name)
  exporting.export_checkpoint(convert(SimpleNamespace(folder=PARITY / name)), output)
  found = load_file(output / "model.safetensors")
  assert found.keys() == {spec.tensor for spec in model.specs.values()}
  for part, spec in model.specs.items():
    tensor = model.tensors[part]
    expected = tensor.read(tuple(slice(0, size) for size in tensor.shape))
    rows = found[spec.tensor][spec.first_row : spec.first_row + spec.shape[0]]
    assert rows.tobytes() == expected.tobytes(), part
  assert (output / "config.json").read_bytes() == (PARITY / name / "config.json").read_bytes()


def test_a_changed_model_gets_a_new_config(make_tiny, convert, output):
  """A config.json that no longer describes the model is not kept."""
  tiny = make_tiny()
  found = dataclasses.replace(convert(tiny), config=tiny.config.replace(rope_theta=5e4))
  exporting.export_checkpoint(found, output)
  config = json.loads((output / "config.json").read_text())
  assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e4


def test_exports_shards_with_an_index_and_companion_files(make_tiny, convert, output):
  tiny = make_tiny()
  companions = {"tokenizer.json": b"{}", "merges.txt": b"a b", "generation_config.json": b'{"x":1}'}
  for name, content in companions.items():
    (tiny.folder / name).write_bytes(content)
  exporting.export_checkpoint(convert(tiny), output, max_shard_bytes=2000)
  index = json.loads((output / "model.safetensors.index.json").read_text())
  files = sorted(output.glob("model-*-of-*.safetensors"))
  assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
  assert len(files) > 1
  found = {name: values for file in files for name, values in load_file(file).items()}
  assert found.keys() == tiny.tensors.keys() == index["weight_map"].keys()
  for name, values in tiny.tensors.items():
    assert found[name].tobytes() == values.tobytes()
  for name, content in companions.items():
    assert (output / name).read_bytes() == content
  assert open_model(output).config == tiny.config


@pytest.mark.parametrize("place", ["output_dir", "step"])
def test_exports_a_training_run(make_tiny, tmp_path, output, place):
  """Parameters are sharded and saved by the trainer's checkpointer; export casts the dtype."""
  tiny = make_tiny(dtype=np.float32)
  mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
  sharding = NamedSharding(mesh, PartitionSpec())
  params = jax.tree.map(
    lambda leaf: jax.device_put(leaf, sharding), open_model(tiny.folder).load_params()
  )
  split = NamedSharding(mesh, PartitionSpec(None, None, "x"))
  params["layers/mlp/up"]["w"] = jax.device_put(params["layers/mlp/up"]["w"], split)
  with checkpoint_manager.RunCheckpoints(
    tmp_path / "run", checkpoint_manager.CheckpointerConfig()
  ) as checkpoints:
    for step in (3, 7):
      checkpoints.save(
        step,
        params=jax.tree.map(lambda leaf, step=step: leaf * (7 / step), params),
        opt_state={"count": np.zeros((), np.int32)},
        meta=checkpoint.model_meta("llama", tiny.config) | {"step": step},
        dataset={"stream": b"0"},
      )
  path = tmp_path / "run" / ("" if place == "output_dir" else "checkpoints/7")
  exporting.export_checkpoint(
    checkpoint.open_checkpoint(path), output, dtype=np.dtype(ml_dtypes.bfloat16)
  )
  found = load_file(output / "model.safetensors")
  assert found.keys() == tiny.tensors.keys()
  for name, values in tiny.tensors.items():
    assert found[name].tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()
  assert json.loads((output / "generation_config.json").read_text()) == {"_from_model_config": True}


def test_token_ids_come_from_the_tokenizer_without_a_published_config(
  make_tiny, tmp_path, output, smollm2_gguf
):
  """A model trained from scratch has a tokenizer but no published config."""
  tiny = make_tiny(vocab_size=49_152, num_layers=1)
  conversion.convert_model(open_model(tiny.folder), tmp_path / "scratch")
  (tmp_path / "scratch" / "hf" / "config.json").unlink()
  (tmp_path / "scratch" / "tokenizer").mkdir()
  for name, content in open_model(smollm2_gguf).tokenizer_files.items():
    (tmp_path / "scratch" / "tokenizer" / name).write_bytes(content())
  exporting.export_checkpoint(
    checkpoint.open_checkpoint(tmp_path / "scratch", verify=False), output
  )
  config = json.loads((output / "config.json").read_text())
  tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
  assert {key: config[key] for key in tokens} == tokens
  generation = json.loads((output / "generation_config.json").read_text())
  assert generation == {"_from_model_config": True} | tokens


def test_a_damaged_checkpoint_is_not_exported(make_tiny, convert, output, tmp_path):
  found = convert(make_tiny())
  chunk = tmp_path / "converted" / "params" / "layers.mlp.up.w" / "1.0.0"
  chunk.unlink()
  with pytest.raises(ValueError, match=r"layers/mlp/up/w"):
    exporting.export_checkpoint(found, output)
  assert not output.exists() and not list(tmp_path.glob(".*"))


def test_parameters_must_match_the_config(make_tiny, convert, output, tmp_path):
  found = convert(make_tiny())
  manifest = tmp_path / "converted" / "ll3m.json"
  meta = json.loads(manifest.read_text())
  meta["config"]["d_ff"] = 21
  meta["config"]["tie_embeddings"] = True
  manifest.write_text(json.dumps(meta))
  found = checkpoint.open_checkpoint(tmp_path / "converted", verify=False)
  with pytest.raises(
    ValueError, match=r"head/w \(expected none, got .*mlp/up/w \(expected \(3, 12"
  ):
    exporting.export_checkpoint(found, output)


def test_an_output_folder_that_is_not_empty_is_rejected(make_tiny, convert, output):
  found = convert(make_tiny())
  output.mkdir()
  exporting.export_checkpoint(found, output)  # an empty folder is accepted
  with pytest.raises(ValueError, match="exported is not empty"):
    exporting.export_checkpoint(found, output)
  with pytest.raises(ValueError, match="local disk, got gs:"):
    exporting.export_checkpoint(found, "gs://bucket/model")


def test_remains_of_a_killed_export_are_replaced(make_tiny, convert, output):
  left = output.with_name(f".{output.name}.unfinished")
  left.mkdir()
  (left / "model.safetensors").write_bytes(b"half")
  exporting.export_checkpoint(convert(make_tiny()), output)
  assert not left.exists()
  assert open_model(output).tensors


@pytest.mark.parametrize(
  ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("200MB", 2 * 10**8), ("77", 77)]
)
def test_parses_sizes(text, size):
  assert exporting.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5GiB", "0.1B"])
def test_rejects_malformed_sizes(text):
  with pytest.raises(ValueError, match="expected a size such as 5GB"):
    exporting.parse_size(text)


def test_chunks_may_be_smaller_than_a_layer(make_tiny, convert, output, monkeypatch):
  monkeypatch.setattr(parameter_store, "CHUNK_BYTES", 100)
  tiny = make_tiny()
  exporting.export_checkpoint(convert(tiny), output)
  found = load_file(output / "model.safetensors")
  for name, values in tiny.tensors.items():
    assert found[name].tobytes() == values.tobytes()
