import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from ll3m.hf.model_files import open_model

INDEX = "model.safetensors.index.json"


def shard(tiny, **index):
  """Splits the weights over two files, with an index."""
  names = sorted(tiny.tensors)
  files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
  (tiny.folder / "model.safetensors").unlink()
  for file, part in files.items():
    save_file({name: tiny.tensors[name] for name in part}, tiny.folder / file)
  weight_map = {name: file for file, part in files.items() for name in part} | index
  (tiny.folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("preset", ["llama2_7b", "mistral_7b", "gemma_2b", "phi_2"])
def test_infers_the_model_from_its_config(make_tiny, preset, same_bits, read_all):
  # A width at which Phi's partial rotary embedding covers a whole number of dimensions.
  tiny = make_tiny(preset, np.float16, num_kv_heads=3, head_dim=10, d_model=30)
  model = open_model(tiny.folder)
  assert (model.family, model.config) == (tiny.family.name, tiny.config)
  assert model.checkpoint_type == "safetensors"
  for name, expected in tiny.tensors.items():
    same_bits(read_all(model.tensors[name]), expected)


def test_reads_shards(make_tiny, same_bits, read_all):
  tiny = make_tiny()
  shard(tiny)
  model = open_model(tiny.folder)
  assert model.tensors.keys() == tiny.tensors.keys()
  for name, expected in tiny.tensors.items():
    same_bits(read_all(model.tensors[name]), expected)


@pytest.mark.parametrize(
  "file", ["../a.safetensors", "/etc/passwd", "x/../a.safetensors", "..", ""]
)
def test_rejects_shards_outside_the_folder(make_tiny, file):
  tiny = make_tiny()
  shard(tiny, **{"model.norm.weight": file})
  with pytest.raises(ValueError, match=r"places model.norm.weight in .*only files of the same"):
    open_model(tiny.folder)


def test_index_and_shards_must_agree(make_tiny):
  tiny = make_tiny()
  shard(tiny, **{"model.norm.weight": "a.safetensors"})
  with pytest.raises(
    ValueError, match=r"names tensors that its files lack \(1\): model.norm.weight"
  ):
    open_model(tiny.folder)
  shutil.copy(tiny.folder / "a.safetensors", tiny.folder / "b.safetensors")
  with pytest.raises(
    ValueError, match=r"b.safetensors repeats tensors of another file \(5\): lm_head"
  ):
    open_model(tiny.folder)
  (tiny.folder / "b.safetensors").unlink()
  with pytest.raises(ValueError, match=r"names b.safetensors, .*missing \("):
    open_model(tiny.folder)
  (tiny.folder / INDEX).write_text("{}")
  with pytest.raises(ValueError, match="index.json is not a weight index"):
    open_model(tiny.folder)
  (tiny.folder / INDEX).unlink()
  shutil.copy(tiny.folder / "a.safetensors", tiny.folder / "c.safetensors")
  with pytest.raises(FileNotFoundError, match=r"has neither .* 2 \*.safetensors files"):
    open_model(tiny.folder)


def test_a_preset_must_match_the_config(make_tiny):
  tiny = make_tiny()
  with pytest.raises(ValueError, match=r"^`model` .*: vocab_size \(expected 32000, got 37\)"):
    open_model(tiny.folder, preset="llama2_7b")
  with pytest.raises(ValueError, match=r"family \(expected mistral, got llama\)"):
    open_model(tiny.folder, preset="mistral_7b")
  with pytest.raises(ValueError, match="model 'llama3'"):
    open_model(tiny.folder, preset="llama3")
  (tiny.folder / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no config.json; give `model`"):
    open_model(tiny.folder)
  with pytest.raises(ValueError, match=r"llama config of 32 layers: missing"):
    open_model(tiny.folder, preset="llama2_7b")


def test_rejects_a_config_that_is_not_an_object(make_tiny):
  tiny = make_tiny()
  for text, message in (("{", "is not JSON"), ("[]", "must hold an object, got list")):
    (tiny.folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      open_model(tiny.folder)


def test_the_checkpoint_type_can_be_chosen(make_tiny):
  tiny = make_tiny()
  with pytest.raises(FileNotFoundError, match="has neither pytorch_model.bin"):
    open_model(tiny.folder, checkpoint_type="pt")
  with pytest.raises(ValueError, match="holds 0 .gguf files"):
    open_model(tiny.folder, checkpoint_type="gguf")
  (tiny.folder / "pytorch_model.bin").write_bytes(b"not read")
  assert open_model(tiny.folder).checkpoint_type == "safetensors"


def test_reports_a_path_without_a_model(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent"):
    open_model(tmp_path / "absent")
  with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors, \*.bin or \*.gguf"):
    open_model(tmp_path)
  with pytest.raises(NotImplementedError, match="read from a local disk, got gs://a/b"):
    open_model("gs://a/b")
  (tmp_path / "x.safetensors").write_bytes(b"")
  with pytest.raises(ValueError, match=r"expected a folder or a .gguf file"):
    open_model(tmp_path / "x.safetensors")


def test_each_parameter_has_one_dtype(make_tiny):
  tiny = make_tiny(dtype=np.float16)
  tensors = dict(tiny.tensors)
  name = "model.layers.{}.mlp.up_proj.weight"
  tensors[name.format(0)] = tensors[name.format(0)].astype(ml_dtypes.bfloat16)
  tiny.save(tensors)
  model = open_model(tiny.folder)
  dtypes = model.parameter_dtypes()
  assert dtypes.pop("layers/mlp/up/w") == np.float32  # represents both exactly
  assert set(dtypes.values()) == {np.dtype(np.float16)}
  asked = np.dtype(ml_dtypes.bfloat16)
  assert set(model.parameter_dtypes(asked).values()) == {asked}


def test_copies_tokenizer_and_config_files_verbatim(make_tiny, tmp_path):
  tiny = make_tiny()
  wanted = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"a": 1}',
    "tokenizer.model": b"\x00\x01",
    "special_tokens_map.json": b"{ }",
    "added_tokens.json": b"[]",
    "vocab.json": b"v",
    "merges.txt": b"m",
    "chat_template.jinja": b"c",
  }
  other = {"README.md": b"r", "generation_config.json": b"{\n}", "training_args.bin": b"t"}
  for name, content in (wanted | other).items():
    (tiny.folder / name).write_bytes(content)
  output = epath.Path(tmp_path / "output")
  open_model(tiny.folder).save_companions(output)
  assert {f.name: f.read_bytes() for f in (output / "tokenizer").iterdir()} == wanted
  assert {f.name: f.read_bytes() for f in (output / "hf").iterdir()} == {
    "config.json": (tiny.folder / "config.json").read_bytes(),
    "generation_config.json": b"{\n}",
  }
