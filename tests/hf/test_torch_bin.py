"""Most files are pickled here with stand-ins for torch's names; torch wrote the committed ones."""

import collections
import io
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ll3m.hf import torch_bin
from ll3m.hf.lazy_tensor import read_part

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"


class Storage:
  """Stand-in for the flat values that torch pickles by reference."""

  def __init__(self, values, kind):
    self.values, self.kind = values, kind


class Rebuilt:
  """An object pickled as a call of a torch function."""

  def __init__(self, function, *args):
    self.call = (function, args)

  def __reduce__(self):
    return self.call


@pytest.fixture
def torch_names(monkeypatch):
  """Modules with the names of torch's, so that pickle writes these names."""
  utils, torch = types.ModuleType("torch._utils"), types.ModuleType("torch")
  for name in ("_rebuild_tensor_v2", "_rebuild_parameter", "_load_from_elsewhere"):
    function = types.FunctionType((lambda *args: None).__code__, {}, name)
    function.__module__, function.__qualname__ = "torch._utils", name
    setattr(utils, name, function)
  for name in ("FloatStorage", "BFloat16Storage", "LongStorage", "QInt8Storage"):
    setattr(torch, name, type(name, (), {"__module__": "torch"}))
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)
  return types.SimpleNamespace(utils=utils, torch=torch)


def save(path, state, *, compression=zipfile.ZIP_STORED, cut=0, order=b"little"):
  """Writes an archive in the format of torch.save."""
  storages = []
  buffer = io.BytesIO()

  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      if not isinstance(obj, Storage):
        return None
      storages.append(obj.values)
      return ("storage", obj.kind, str(len(storages) - 1), "cpu", obj.values.size)

  Pickler(buffer, protocol=2).dump(state)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", buffer.getvalue())
    archive.writestr("archive/byteorder", order)
    for i, values in enumerate(storages):
      archive.writestr(f"archive/data/{i}", values.tobytes()[: values.nbytes - cut])


def tensor(names, storage, offset, shape, strides):
  hooks = collections.OrderedDict()
  return Rebuilt(names.utils._rebuild_tensor_v2, storage, offset, shape, strides, False, hooks)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "pytorch_model.bin"


def test_reads_strides_offsets_parameters_and_shared_storages(
  path, torch_names, same_bits, read_all
):
  values = np.arange(24, dtype=np.float32)
  half = np.arange(6).astype(ml_dtypes.bfloat16)
  storage = Storage(values, torch_names.torch.FloatStorage)
  view = tensor(torch_names, storage, 2, (4, 3), (1, 5))
  hooks = collections.OrderedDict()
  state = collections.OrderedDict(
    view=view,
    parameter=Rebuilt(torch_names.utils._rebuild_parameter, view, True, hooks),
    half=tensor(torch_names, Storage(half, torch_names.torch.BFloat16Storage), 0, (2, 3), (3, 1)),
    scalar=tensor(torch_names, Storage(values[:1], torch_names.torch.FloatStorage), 0, (), ()),
    empty=tensor(torch_names, storage, 0, (0, 3), (3, 1)),
  )
  state._metadata = {"version": 1}  # as in state_dict()
  save(path, state)
  found = torch_bin.read_torch_bin(path)
  expected = np.array([[values[2 + i + 5 * j] for j in range(3)] for i in range(4)])
  same_bits(read_all(found["view"]), expected)
  same_bits(read_part(found["parameter"], (slice(0, 3), slice(1, 4)), transpose=True),
            expected.T[0:3, 1:4])  # fmt: skip
  same_bits(read_all(found["half"]), half.reshape(2, 3))
  same_bits(read_part(found["scalar"], ()), np.array(0, np.float32))
  assert read_all(found["empty"]).shape == (0, 3)


def test_reads_a_file_written_by_torch(read_all):
  """Checks the rotary frequencies, whose values are known; test_parity covers the rest."""
  folder = FIXTURES / "open_llama_sharded"
  config = json.loads((folder / "config.json").read_text())
  index = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
  head_dim = config["hidden_size"] // config["num_attention_heads"]
  expected = 1e4 ** -(np.arange(0, head_dim, 2) / head_dim)
  for layer in range(config["num_hidden_layers"]):
    name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
    found = torch_bin.read_torch_bin(folder / index[name])[name]
    np.testing.assert_allclose(read_all(found), expected, rtol=1e-3)


class Evil:
  def __reduce__(self):
    return os.system, ("touch /dev/null",)


@pytest.mark.parametrize(
  ("state", "message"),
  [
    ({"w": Evil()}, r"posix.system; only plain tensors"),
    (collections.OrderedDict(w=collections.Counter()), "collections.Counter; only plain tensors"),
    ({"w": 3}, "'w' is not a tensor"),
    ({"model": {}}, "'model' is not a tensor"),
    ([1], "holds a list, expected a dict"),
  ],
)
def test_runs_no_code_and_reads_only_tensors(path, state, message):
  save(path, state)
  with pytest.raises(ValueError, match=message):
    torch_bin.read_torch_bin(path)


def test_rejects_other_names_of_torch(path, torch_names):
  save(path, {"w": Rebuilt(torch_names.utils._load_from_elsewhere, "x")})
  with pytest.raises(ValueError, match="torch._utils._load_from_elsewhere; only plain tensors"):
    torch_bin.read_torch_bin(path)
  save(path, {"w": Storage(np.zeros(2), torch_names.torch.QInt8Storage)})
  with pytest.raises(ValueError, match="torch.QInt8Storage; only plain tensors"):
    torch_bin.read_torch_bin(path)


@pytest.mark.parametrize(
  ("offset", "shape", "strides"),
  [(5, (2, 4), (4, 1)), (0, (3, 4), (5, 1)), (-1, (2, 2), (2, 1)), (0, (2, 2), (-1, 1)),
   (0, (2, 2), (1,)), (0, (2, "2"), (2, 1))],
)  # fmt: skip
def test_rejects_tensors_outside_their_storage(path, torch_names, offset, shape, strides):
  storage = Storage(np.zeros(12, np.float32), torch_names.torch.FloatStorage)
  save(path, {"w": tensor(torch_names, storage, offset, shape, strides)})
  with pytest.raises(ValueError, match="beyond its storage|description .* malformed"):
    torch_bin.read_torch_bin(path)


def test_rejects_short_compressed_and_big_endian_storages(path, torch_names):
  storage = Storage(np.zeros(12, np.float32), torch_names.torch.FloatStorage)
  state = {"w": tensor(torch_names, storage, 0, (12,), (1,))}
  save(path, state, cut=4)
  with pytest.raises(ValueError, match="storage 0 should hold 48 bytes, .* 44"):
    torch_bin.read_torch_bin(path)
  save(path, state, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(NotImplementedError, match="compressed"):
    torch_bin.read_torch_bin(path)
  save(path, state, order=b"big")
  with pytest.raises(NotImplementedError, match="big-endian"):
    torch_bin.read_torch_bin(path)


def test_reports_files_of_another_kind(path):
  path.write_bytes(pickle.dumps({"w": 1}, protocol=2))
  with pytest.raises(NotImplementedError, match=r"pytorch_model.bin was written by torch before"):
    torch_bin.read_torch_bin(path)
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(ValueError, match="pytorch_model.bin is a Git LFS pointer"):
    torch_bin.read_torch_bin(path)
  path.write_bytes((FIXTURES / "open_llama" / "pytorch_model.bin").read_bytes()[:5000])
  with pytest.raises(ValueError, match="pytorch_model.bin is truncated"):
    torch_bin.read_torch_bin(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a/readme.txt", "hello")
  with pytest.raises(ValueError, match="zip archive.* torch.save"):
    torch_bin.read_torch_bin(path)
