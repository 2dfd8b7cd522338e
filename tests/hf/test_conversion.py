import json
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash
from etils import epath

from ll3m.core import checkpoint, model_folder, parameter_store
from ll3m.hf import conversion
from ll3m.hf.lazy_tensor import LazyTensor
from ll3m.hf.model_files import open_model


@pytest.fixture
def output(tmp_path):
  return tmp_path / "converted"


def test_stacks_layers_and_transposes_linear_weights(make_tiny, output, same_bits, monkeypatch):
  monkeypatch.setattr(parameter_store, "CHUNK_BYTES", 100)  # pieces of a few rows
  tiny = make_tiny("phi_2", head_dim=10, d_model=30, num_kv_heads=3)
  done = conversion.convert_model(open_model(tiny.folder), output)
  params = ocp.StandardCheckpointer().restore(output / "params")
  layers = range(tiny.config.num_layers)

  def stack(name):
    return np.stack([tiny.tensors[f"model.layers.{i}.{name}"] for i in layers])

  attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
  expected = [
    (params["embed"]["embedding"], tiny.tensors["model.embed_tokens.weight"]),
    (params["head"]["w"], tiny.tensors["lm_head.weight"].T),
    (params["head"]["b"], tiny.tensors["lm_head.bias"]),
    (params["final_norm"]["bias"], tiny.tensors["model.final_layernorm.bias"]),
    (params["layers"]["attention_norm"]["scale"], stack("input_layernorm.weight")),
    (attention["query"]["w"], stack("self_attn.q_proj.weight").swapaxes(1, 2)),
    (attention["out"]["w"], stack("self_attn.dense.weight").swapaxes(1, 2)),
    (mlp["up"]["w"], stack("mlp.fc1.weight").swapaxes(1, 2)),
    (mlp["down"]["b"], stack("mlp.fc2.bias")),
  ]
  for found, values in expected:
    same_bits(np.asarray(found), np.ascontiguousarray(values))
  assert done.tensors == len(tiny.tensors)
  assert done.parameters == sum(values.size for values in tiny.tensors.values())
  assert done.nbytes == 2 * done.parameters


def test_the_folder_is_a_complete_checkpoint_with_checksums(make_tiny, output):
  tiny = make_tiny()
  (tiny.folder / "tokenizer.json").write_text("{}")
  conversion.convert_model(open_model(tiny.folder), output)
  found = checkpoint.open_checkpoint(output)
  assert (found.family, found.config) == ("llama", tiny.config)
  assert (found.tokenizer_dir / "tokenizer.json").read_text() == "{}"
  assert json.loads((found.source_dir / "config.json").read_text())["bos_token_id"] == 1
  files = {str(f.relative_to(output)): f for f in output.rglob("*") if f.is_file()}
  listed = json.loads(files.pop("digests.json").read_text())
  assert files.keys() == listed.keys()
  assert {"ll3m.json", "params/layers.mlp.up.w/2.0.0", "params/_METADATA"} <= files.keys()
  for name, file in files.items():
    data = file.read_bytes()
    assert listed[name] == {"bytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_casts_every_parameter(make_tiny, output, dtype, same_bits):
  tiny = make_tiny(dtype=np.float32)
  conversion.convert_model(open_model(tiny.folder), output, np.dtype(dtype))
  params = ocp.StandardCheckpointer().restore(output / "params")
  expected = tiny.tensors["lm_head.weight"].astype(dtype)
  same_bits(np.asarray(params["head"]["w"]), np.ascontiguousarray(expected.T))


def test_a_failed_conversion_is_no_checkpoint_and_can_be_repeated(make_tiny, output, capfd):
  tiny = make_tiny(dtype=np.float32)
  tiny.save(tiny.tensors | {"lm_head.weight": np.full((37, 12), 1e9, np.float32)})
  with pytest.raises(ValueError, match=r"444 values in .*published.* do not fit float16"):
    conversion.convert_model(open_model(tiny.folder), output, np.dtype(np.float16))
  with pytest.raises(ValueError, match="not a complete checkpoint: .* has no ll3m.json"):
    checkpoint.open_checkpoint(output)
  conversion.convert_model(open_model(tiny.folder), output)
  assert checkpoint.open_checkpoint(output).family == "llama"
  assert "convert: 100%" in capfd.readouterr().err


def test_an_interrupted_conversion_stops_reading(make_tiny, output):
  model = open_model(make_tiny(num_layers=40).folder)
  reads = []

  def read(index):
    reads.append(index)
    raise OSError("the disk is gone")

  for name, tensor in model.tensors.items():
    model.tensors[name] = LazyTensor(tensor.shape, tensor.dtype, read, tensor.source)
  with pytest.raises(OSError, match="the disk is gone"):
    conversion.convert_model(model, output)
  assert len(reads) < len(model.tensors)


def test_an_output_folder_with_anything_else_is_refused(make_tiny, output):
  model = open_model(make_tiny().folder)
  conversion.convert_model(model, output)
  with pytest.raises(ValueError, match="output folder .*/converted"):
    conversion.convert_model(model, output)
  shutil.rmtree(output)
  output.mkdir()
  (output / "mine").write_text("")
  with pytest.raises(ValueError, match="output folder .*/converted"):
    conversion.convert_model(model, output)
  assert [f.name for f in output.iterdir()] == ["mine"]
  (output / "mine").unlink()
  conversion.convert_model(model, output)  # an empty one is fine
  with pytest.raises(ValueError, match="is a file"):
    conversion.convert_model(model, output / "ll3m.json")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match=r"needs 1000000000.0 GB"):
    model_folder.prepare_output(epath.Path(tmp_path / "output"), 10**18)
  assert not list((tmp_path / "output").iterdir())
