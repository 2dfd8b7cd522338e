import ml_dtypes
import numpy as np
import pytest

from ll3m.hf import lazy_tensor


@pytest.fixture
def stored(tmp_path):
  """A [35, 19] float32 matrix on disk, at offset 8 of its file."""
  values = np.random.default_rng(0).standard_normal((35, 19), np.float32)
  path = tmp_path / "values"
  path.write_bytes(b"12345678" + values.tobytes())
  return values, lazy_tensor.mapped_tensor(path, values.dtype, values.shape, 8)


def test_reads_any_part(stored):
  values, tensor = stored
  part = lazy_tensor.read_part(tensor, (slice(3, 20), slice(5, 6)))
  np.testing.assert_array_equal(part, values[3:20, 5:6])
  assert part.flags.c_contiguous and part.flags.owndata
  assert tensor.nbytes == values.nbytes


def test_the_index_applies_to_the_transposed_result(stored):
  values, tensor = stored
  part = lazy_tensor.read_part(tensor, (slice(2, 19), slice(1, 34)), transpose=True)
  np.testing.assert_array_equal(part, values.T[2:19, 1:34])
  assert part.flags.c_contiguous


@pytest.mark.parametrize("transpose", [False, True])
def test_casts_to_nearest_even(transpose):
  # 1 + 2**-8 is a tie between the bf16 neighbours 1 and 1 + 2**-7; it rounds to the even 1.
  values = np.array([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]], np.float32)
  expected = np.array([[1, 1 + 2**-6, 1 + 2**-7]], np.float32)
  result = lazy_tensor.arrange(values, transpose, np.dtype(ml_dtypes.bfloat16), "here")
  np.testing.assert_array_equal(result, (expected.T if transpose else expected))


def test_rejects_a_cast_that_overflows():
  values = np.array([1.0, 7e4, np.inf], np.float32)
  with pytest.raises(ValueError, match=r"1 values in the test do not fit float16.*6.55e\+04"):
    lazy_tensor.arrange(values, False, np.dtype(np.float16), "the test")
  kept = lazy_tensor.arrange(values[[0, 2]], False, np.dtype(np.float16), "the test")
  np.testing.assert_array_equal(kept, np.array([1, np.inf], np.float16))


def test_reads_an_empty_tensor(tmp_path, read_all):
  tensor = lazy_tensor.mapped_tensor(tmp_path / "absent", np.dtype(np.float32), (0, 3), 8)
  assert read_all(tensor).shape == (0, 3)


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
    (b"<!DOCTYPE html><html>", "HTML page"),
    (b"\n <html lang=en>", "HTML page"),
    (b"", "empty"),
    (b"GGUF", None),
  ],
)
def test_describes_a_file_saved_in_place_of_weights(tmp_path, content, expected):
  path = tmp_path / "file"
  path.write_bytes(content)
  found = lazy_tensor.describe_wrong_file(path)
  assert found is None if expected is None else expected in found
