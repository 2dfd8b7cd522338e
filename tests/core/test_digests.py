"""Digests of the files of a folder."""

import json

import pytest
from etils import epath

from ll3m.core import digests

# xxHash's own test vectors for XXH3_64bits with seed 0 (xxhash 0.8, tests/sanity_test_vectors.h).
EMPTY = "2d06800538d394c2"


@pytest.fixture
def folder(tmp_path) -> epath.Path:
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "empty").write_bytes(b"")
  (tmp_path / "a" / "b" / "large").write_bytes(bytes(range(256)) * 8192)  # more than one block
  return epath.Path(tmp_path)


def test_lists_every_file_but_those_that_do_not_stay(folder):
  (folder / "part").write_text("")
  digests.write(folder, {"later": digests.of([b"ab", b"", b"c"])}, leave_out=["part"])
  listed = json.loads((folder / "digests.json").read_text())
  assert list(listed) == ["a/b/large", "empty", "later"]
  assert listed["empty"] == {"bytes": 0, "xxh3": EMPTY}
  assert listed["a/b/large"]["bytes"] == 2**21
  with pytest.raises(ValueError, match="damaged checkpoint .*: later is missing$"):
    digests.check(folder)
  (folder / "later").write_text("abc")
  digests.check(folder)


def test_names_what_changed(folder):
  digests.write(folder)
  (folder / "more").write_text("files may come beside")
  digests.check(folder)
  (folder / "empty").write_text("x")
  large = bytearray((folder / "a" / "b" / "large").read_bytes())
  large[2**20 + 5] ^= 1
  (folder / "a" / "b" / "large").write_bytes(large)
  with pytest.raises(ValueError) as error:
    digests.check(folder)
  assert str(error.value) == (
    f"damaged checkpoint {folder}: a/b/large has another checksum than when it was saved; "
    f"empty has 1 bytes, it was saved with 0"
  )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": null}', "\x00"])
def test_a_list_that_cannot_be_read_is_damage(folder, text):
  (folder / "digests.json").write_text(text)
  with pytest.raises(ValueError, match="damaged checkpoint .*digests.json cannot be read"):
    digests.check(folder)


def test_without_a_list_a_folder_is_taken_as_it_is_and_that_is_told(folder, caplog):
  digests.check(folder)
  assert f"{folder} has no digests.json: it is taken as it is" in caplog.text
