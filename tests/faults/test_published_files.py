"""Invalid published models: the fault is named, the model refused, and nothing is written."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ll3m.core import checkpoint
from ll3m.hf.conversion import convert_model
from ll3m.hf.model_files import open_model
from tests.faults.causing import PARITY, files

INDEX = "model.safetensors.index.json"


@pytest.fixture
def published(tmp_path) -> Path:
  """A small model in one file."""
  return shutil.copytree(PARITY / "llama2", tmp_path / "published")


@pytest.fixture
def sharded(tmp_path) -> Path:
  """A small model in three files with an index."""
  folder = shutil.copytree(PARITY / "llama2", tmp_path / "sharded")
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = sorted(tensors)
  parts = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
  for file, held in parts.items():
    save_file({name: tensors[name] for name in held}, folder / file)
  weight_map = {name: file for file, held in parts.items() for name in held}
  (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  return folder


def edit_json(path: Path, **changes) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(folder: Path, *parts: str, preset: str | None = None) -> str:
  """Asserts that a conversion is refused with these parts in the message, and writes nothing."""
  before, output = files(folder.parent), folder.parent / "output"
  with pytest.raises((ValueError, NotImplementedError, OSError)) as error:
    convert_model(open_model(folder, preset=preset), output)
  for part in parts:
    assert part in str(error.value)
  assert not output.exists() and files(folder.parent) == before
  return str(error.value)


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    (b"<!DOCTYPE html><html><body>401</body></html>", "an HTML page"),
    (b"", "empty"),
    (None, "is truncated: expected"),
  ],
)
def test_shard_that_is_no_safetensors_file_is_refused(sharded, content, what):
  shard = sorted(sharded.glob("*.safetensors"))[-1]
  shard.write_bytes(shard.read_bytes()[:-1] if content is None else content)
  refuse(sharded, str(shard), what)


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_index_that_leads_out_of_the_folder_is_refused(sharded, place):
  index = json.loads((sharded / INDEX).read_text())
  index["weight_map"]["lm_head.weight"] = place
  (sharded / INDEX).write_text(json.dumps(index))
  refuse(sharded, repr(place), "only files of the same folder")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_link_that_leads_out_of_the_folder_is_refused(published, tmp_path, name):
  (tmp_path / "secret").write_bytes(b"{}")
  (published / name).unlink(missing_ok=True)
  (published / name).symlink_to(tmp_path / "secret")
  refuse(published, f"{published / name} is a link")


def test_the_links_of_the_hubs_cache_are_followed(published, tmp_path):
  blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "ab12"
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for file in ("config.json", "model.safetensors"):
    (published / file).rename(blobs / file)
    (snapshot / file).symlink_to(f"../../blobs/{file}")
  convert_model(open_model(snapshot), tmp_path / "output")
  assert checkpoint.open_checkpoint(tmp_path / "output").family == "llama"


def test_all_problems_are_listed_at_once(sharded):
  first, *others = sorted(sharded.glob("*.safetensors"))
  values = load_file(first)
  norm, other, dropped = [n for n in sorted(values) if n.startswith("model.layers")][:3]
  values |= {norm: np.ones(3, np.float32), "model.surprise": np.ones(2, np.float32)}
  values[other] = np.ones(values[other].shape, np.int64)
  del values[dropped]
  save_file(values, first)
  others[-1].unlink()
  repeated = shutil.copy(others[0], sharded / "again.safetensors")
  index = json.loads((sharded / INDEX).read_text())
  index["weight_map"]["model.other"] = Path(repeated).name
  (sharded / INDEX).write_text(json.dumps(index))
  refuse(
    sharded,
    f"names {others[-1].name}, which ",
    "repeats tensors of another file (",
    f"names tensors that its files lack (2): {dropped}, model.other",
    "does not name tensors of its files (1): model.surprise",
    "missing (",
    "expected (1): model.surprise",
    f"{other} (expected a floating-point dtype, got int64)",
    f"{norm} (expected (",
    "wrong shape or dtype (2): ",
  )


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"head_dim": 16}, "self_attn.q_proj.weight (expected "),
    ({"num_key_value_heads": 1}, "self_attn.k_proj.weight (expected "),
    ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ({"vocab_size": 100}, "model.embed_tokens.weight (expected (100, "),
    ({"intermediate_size": 7}, "mlp.up_proj.weight (expected (7, "),
    ({"num_hidden_layers": 3}, "missing (9): model.layers.2."),
    ({"num_hidden_layers": 1}, "expected (9): model.layers.1."),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"hidden_act": "relu"}, "the activation 'relu'"),
    ({"model_type": "phi"}, "config.json"),
  ],
)
def test_config_that_contradicts_the_weights_is_refused(published, changes, part):
  config = json.loads((published / "config.json").read_text())
  if "num_key_value_heads" in changes and config["num_key_value_heads"] == 1:
    changes = {"num_key_value_heads": 2}
  (published / "config.json").write_text(json.dumps(config | changes))
  refuse(published, part)


@pytest.mark.parametrize(
  ("fixture", "preset", "changes", "part"),
  [
    ("mistral", "mistral_7b", {"sliding_window": 7}, "sliding_window (expected 4096, got 7)"),
    ("phi_2", "phi_2", {"partial_rotary_factor": 0.5}, "rotary_fraction (expected 0.4, got 0.5)"),
    ("llama2", "llama2_7b", {"rope_theta": 5e5}, "rope_theta (expected 10000.0, got 500000.0)"),
    ("llama2", "llama2_7b", {"rms_norm_eps": 1e-6}, "norm_epsilon (expected 1e-05, got 1e-06)"),
  ],
)
def test_settings_absent_from_weights_must_match_the_preset(
  tmp_path, fixture, preset, changes, part
):
  folder = shutil.copytree(PARITY / fixture, tmp_path / "published")
  edit_json(folder / "config.json", **changes)
  refuse(folder, part, preset=preset)


class Payload:
  """The payload of a malicious checkpoint: a call that unpickling makes."""

  def __init__(self, victim: Path):
    self.victim = victim

  def __reduce__(self):
    return (os.system, (f"touch {self.victim}",))


def test_malicious_pickle_does_not_run(published, tmp_path):
  victim = tmp_path / "owned"
  payload = pickle.dumps({"model.norm.weight": Payload(victim)}, protocol=2)
  pickle.loads(payload)  # the payload is real: unpickling runs it
  assert victim.exists()
  victim.unlink()
  (published / "model.safetensors").unlink()
  with zipfile.ZipFile(published / "pytorch_model.bin", "w") as archive:
    archive.writestr("archive/data.pkl", payload)
    archive.writestr("archive/version", "3")
  refuse(published, "posix.system", "only plain tensors")
  assert not victim.exists()
  (published / "pytorch_model.bin").write_bytes(payload)  # the format of torch before 1.6
  refuse(published, "pytorch_model.bin")
  assert not victim.exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_refused_unless_allowed(published, tmp_path, dtype, value):
  tensors = {
    name: t.astype(dtype) for name, t in load_file(published / "model.safetensors").items()
  }
  bad = ["lm_head.weight", "model.layers.1.input_layernorm.weight"]
  for name in bad:
    tensors[name].reshape(-1)[-1] = value
  save_file(tensors, published / "model.safetensors")
  output = tmp_path / "output"
  with pytest.raises(ValueError, match=r"NaN or infinities \(2\): " + ", ".join(bad)):
    convert_model(open_model(published), output)
  with pytest.raises(ValueError, match="not a complete checkpoint"):
    checkpoint.open_checkpoint(output)
  convert_model(open_model(published), output, allow_nonfinite=True)
  assert checkpoint.open_checkpoint(output).family == "llama"
