"""Checksums of the files of a folder."""

import json

import jax
import numpy as np
import pytest
import xxhash
from etils import epath

from ll3m.core import checksums

# XXH3_64bits of no bytes with seed 0, as xxHash publishes it (tests/sanity_test_vectors.h).
EMPTY = "2d06800538d394c2"


@pytest.fixture
def folder(tmp_path) -> epath.Path:
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "empty").write_bytes(b"")
  (tmp_path / "a" / "b" / "large").write_bytes(bytes(range(256)) * 8192)  # more than one block
  return epath.Path(tmp_path)


def test_all_files_but_temporary_ones_are_listed(folder):
  (folder / "part").write_text("")
  checksums.write(folder, {"later": checksums.of([b"ab", b"", b"c"])}, leave_out=["part"])
  listed = json.loads((folder / "digests.json").read_text())
  assert list(listed) == ["a/b/large", "empty", "later"]
  assert listed["empty"] == {"bytes": 0, "xxh3": EMPTY}
  whole = (folder / "a" / "b" / "large").read_bytes()  # in one piece; `write` reads it in blocks
  assert listed["a/b/large"] == {"bytes": 2**21, "xxh3": xxhash.xxh3_64_hexdigest(whole)}
  with pytest.raises(ValueError, match="damaged checkpoint .*: later is missing$"):
    checksums.check(folder)
  (folder / "later").write_text("abc")
  checksums.check(folder)


def test_changed_files_are_named(folder):
  checksums.write(folder)
  (folder / "more").write_text("files may be added")
  checksums.check(folder)
  (folder / "empty").write_text("x")
  large = bytearray((folder / "a" / "b" / "large").read_bytes())
  large[2**20 + 5] ^= 1
  (folder / "a" / "b" / "large").write_bytes(large)
  with pytest.raises(ValueError) as error:
    checksums.check(folder)
  assert str(error.value) == (
    f"damaged checkpoint {folder}: a/b/large does not match its checksum; "
    f"empty has 1 bytes, expected 0"
  )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": null}', "\x00"])
def test_unreadable_digests_count_as_damage(folder, text):
  (folder / "digests.json").write_text(text)
  with pytest.raises(ValueError, match="damaged checkpoint .*digests.json cannot be read"):
    checksums.check(folder)


def test_folder_in_place_of_the_digests_counts_as_damage(folder):
  (folder / "digests.json").mkdir()
  with pytest.raises(ValueError, match="damaged checkpoint .*digests.json cannot be read"):
    checksums.check(folder)


def test_single_process_does_not_initialise_devices(folder, monkeypatch):
  def started():
    raise AssertionError("the devices were initialised")

  checksums.write(folder)
  monkeypatch.setattr(jax, "process_index", started)
  monkeypatch.setattr(jax, "process_count", started)
  checksums.check(folder)


@pytest.mark.parametrize("damage", ["none", "file", "cut", "missing", "folder"])
def test_processes_exchange_results_whatever_each_finds(folder, monkeypatch, damage):
  gathered = []

  def allgather(count):
    gathered.append(int(count))
    return np.array([count, 1])  # the other process always finds damage

  checksums.write(folder)
  path = folder / "digests.json"
  match damage:
    case "file":
      (folder / "a" / "b" / "large").unlink()
    case "cut":
      path.write_text(path.read_text()[:9])
    case "missing" | "folder":
      path.unlink()
  if damage == "folder":
    path.mkdir()
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(checksums.multihost_utils, "process_allgather", allgather)
  with pytest.raises(ValueError, match="damaged checkpoint") as error:
    checksums.check(folder)
  found = damage not in ("none", "missing")
  assert gathered == [int(found)]
  assert ("process 1 found files that changed" in str(error.value)) == (not found)


def test_folder_without_digests_is_accepted_with_a_warning(folder, caplog):
  checksums.check(folder)
  assert f"{folder} has no digests.json" in caplog.text
