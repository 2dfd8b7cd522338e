"""Oracle: the safetensors library."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ll3m.hf import safetensors_io
from ll3m.hf.lazy_tensor import read_part

TENSORS = {
  "b": np.arange(35, dtype=np.float32).reshape(5, 7),
  "a": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
  "c.half": np.arange(4, dtype=np.float16),
  "mask": np.array([[True, False]]),
  "scalar": np.array(3, np.int64),
  "é": np.arange(3, dtype=np.float64),
}


@pytest.fixture
def stored(tmp_path):
  path = tmp_path / "model.safetensors"
  save_file(TENSORS, path)
  return path


def test_reads_files_written_by_the_library(stored, same_bits, read_all):
  found = safetensors_io.read_safetensors(stored)
  assert found.keys() == TENSORS.keys()
  for name, expected in TENSORS.items():
    same_bits(read_all(found[name]), expected)
  np.testing.assert_array_equal(
    read_part(found["b"], (slice(1, 4), slice(2, 3))), TENSORS["b"][1:4, 2:3]
  )


def infos(tensors):
  return {k: safetensors_io.TensorInfo(v.shape, v.dtype) for k, v in tensors.items()}


def test_writes_the_same_bytes_as_the_library(tmp_path):
  tensors = {k: v for k, v in TENSORS.items() if v.dtype != bool and v.ndim}
  save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
  with safetensors_io.SafetensorsWriter(tmp_path, infos(tensors), 10**9) as writer:
    for name in reversed(tensors):
      writer.write(name, tensors[name])
  assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_writes_pieces_in_any_order_to_shards_with_an_index(tmp_path, same_bits):
  tensors = {f"w{i}": np.random.default_rng(i).random((6, 5)) for i in range(5)}
  with safetensors_io.SafetensorsWriter(
    tmp_path, infos(tensors), 500
  ) as writer:  # two tensors of 240 bytes per shard
    for name, values in tensors.items():
      writer.write(name, values[4:], start_row=4)
      writer.write(name, values[:4])
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"] == {"total_size": 5 * 240}
  files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  assert index["weight_map"] == {
    "w0": files[0], "w1": files[0], "w2": files[1], "w3": files[1], "w4": files[2],
  }  # fmt: skip
  for name, file in index["weight_map"].items():
    same_bits(load_file(tmp_path / file)[name], tensors[name])


def test_a_tensor_larger_than_a_shard_gets_its_own_shard(tmp_path):
  tensors = {"small": np.zeros(2), "large": np.zeros(9), "last": np.zeros(2)}
  with safetensors_io.SafetensorsWriter(tmp_path, infos(tensors), 40) as writer:
    for name, values in tensors.items():
      writer.write(name, values)
  found = [sorted(load_file(f)) for f in sorted(tmp_path.glob("model-*.safetensors"))]
  assert found == [["small"], ["large"], ["last"]]


def test_raises_if_a_tensor_is_incomplete(tmp_path):
  def write_partly():
    with safetensors_io.SafetensorsWriter(tmp_path, infos({"w": np.zeros((4, 2))}), 100) as writer:
      writer.write("w", np.zeros((3, 2)))

  with pytest.raises(ValueError, match="not written completely: w"):
    write_partly()
  assert not (tmp_path / safetensors_io.INDEX_NAME).exists()


def test_rejects_values_of_another_dtype_than_declared(tmp_path):
  writer = safetensors_io.SafetensorsWriter(tmp_path, infos({"w": np.zeros((4, 2))}), 100)
  with pytest.raises(ValueError, match=r"expected float64 of shape \(4, 2\), got float32"):
    writer.write("w", np.zeros((4, 2), np.float32))
  with pytest.raises(ValueError, match="positive, got 0"):
    safetensors_io.SafetensorsWriter(tmp_path, {}, 0)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_reports_a_truncated_file(stored, length):
  stored.write_bytes(stored.read_bytes()[:length])
  with pytest.raises(ValueError, match=r"model.safetensors is (truncated|empty)"):
    safetensors_io.read_safetensors(stored)


def test_reports_a_file_that_is_too_long(stored):
  stored.write_bytes(stored.read_bytes() + b"0")
  with pytest.raises(ValueError, match="longer than its header says: expected"):
    safetensors_io.read_safetensors(stored)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html>not found</html>", "HTML page"),
  ],
)
def test_reports_a_file_of_another_kind(stored, content, message):
  stored.write_bytes(content)
  with pytest.raises(ValueError, match=f"model.safetensors is an? {message}"):
    safetensors_io.read_safetensors(stored)


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "w should hold 8 bytes"),
    ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "w should hold 4 bytes"),
    ({"w": {"dtype": "F32", "shape": [1]}}, "entry for w is malformed"),
    ({"w": 3}, "entry for w is malformed"),
    ([], "header is not an object"),
  ],
)
def test_rejects_an_inconsistent_header(tmp_path, header, message):
  text = json.dumps(header).encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(struct.pack("<Q", len(text)) + text + b"0000")
  with pytest.raises(ValueError, match=message):
    safetensors_io.read_safetensors(path)


def test_rejects_an_unknown_dtype(tmp_path):
  text = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(struct.pack("<Q", len(text)) + text + b"0")
  with pytest.raises(NotImplementedError, match="w has the dtype F4"):
    safetensors_io.read_safetensors(path)
