"""Lines and bytes of text files; the oracles are bytes.split, gzip and zstandard."""

import gzip
import io

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ll3m.data.text_files import open_stream, read_bytes, require_utf8, split_lines

BOM = b"\xef\xbb\xbf"
# Line ends of `str.splitlines` and `bytes.splitlines`, and a byte order mark.
PIECES = [
  b"a", b"\n", b"\r", b"\r\n", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\xc2\x85",
  b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xef\xbb\xbf", b" ",
]  # fmt: skip


def brute_force(data):
  lines = data.removeprefix(BOM).split(b"\n")
  if not lines[-1]:
    lines.pop()
  ends = [line.removesuffix(b"\r") for line in lines]
  if lines and not data.endswith(b"\n"):
    ends[-1] = lines[-1]  # a lone \r does not end a line
  return list(enumerate(ends, start=1))


@given(st.lists(st.sampled_from(PIECES)).map(b"".join))
def test_only_line_feeds_end_a_line(data):
  assert [(n, data[a:b]) for n, a, b in split_lines(data)] == brute_force(data)


def test_line_numbers_continue_in_a_later_part():
  assert list(split_lines(BOM + b"a\n\nb", 7)) == [(7, 0, 4), (8, 5, 5), (9, 6, 7)]


def zstd_frames(data):
  half = len(data) // 2
  return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


def long_window(data):
  """Compresses like `zstd --long=28`, which decoders refuse unless they allow such windows."""
  parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
  out = io.BytesIO()
  compressor = zstandard.ZstdCompressor(compression_params=parameters)
  with compressor.stream_writer(out, closefd=False) as writer:
    writer.write(data)
  return out.getvalue()


CODECS = [gzip.compress, zstandard.compress, zstd_frames, long_window]


@pytest.mark.parametrize("encode", CODECS)
@pytest.mark.parametrize("data", [b"", b"a", b"some text\r\n" * 100_000])
def test_compression_is_found_by_name_and_by_content(tmp_path, encode, data):
  named = tmp_path / ("a.txt.gz" if encode is gzip.compress else "a.txt.ZST")
  for file in (named, tmp_path / "plain"):
    file.write_bytes(encode(data))
    assert read_bytes(str(file)) == data
    with open_stream(str(file)) as (stream, _):
      assert b"".join(iter(lambda: stream.read(65_537), b"")) == data


@pytest.mark.parametrize(("encode", "ending"), [(gzip.compress, ".gz"), (zstd_frames, ".zst")])
def test_a_truncated_or_invalid_compressed_file_is_refused(tmp_path, encode, ending):
  file, kind = tmp_path / f"a{ending}", {".gz": "gzip", ".zst": "Zstandard"}[ending]
  whole = encode(bytes(range(256)) * 9)
  for data in (whole[:-1], whole[: len(whole) // 4], whole[:5], b"plain text", b"x"):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{file} .*{kind}"):
      read_bytes(str(file))


def test_uncompressed_files_are_memory_mapped(tmp_path):
  (tmp_path / "a").write_bytes(b"text")
  (tmp_path / "b").touch()
  mapped = read_bytes(str(tmp_path / "a"))
  assert not isinstance(mapped, bytes) and mapped[:] == b"text"
  assert read_bytes(str(tmp_path / "b")) == b""


@pytest.mark.parametrize(
  "text", ['{"prompt": "naïve"}\n', "one\r\n", "é", "Привет, world: 12 34 56\n"]
)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_wide_encodings_with_a_mark_are_named(text, encoding):
  name = encoding.upper()
  for data in (text.encode(encoding), b"\xfe\xff" + text.encode("utf-16-be")):
    name = encoding.upper() if data == text.encode(encoding) else "UTF-16"
    with pytest.raises(ValueError, match=f"^a.txt is {name}: convert it with `iconv -f {name} -t"):
      require_utf8("a.txt", data)


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("text", ['{"prompt": "naïve"}\n', "a line of text, “quoted”\r\n" * 500])
def test_wide_encodings_without_a_mark_are_named(text, encoding):
  with pytest.raises(
    ValueError, match=f"is {encoding}: convert it with `iconv -f {encoding} -t UTF"
  ):
    require_utf8("a.txt", text.encode(encoding))


@given(st.text(min_size=1))
def test_utf8_is_never_taken_for_another_encoding(text):
  if text.strip("\0"):  # a few letters between NULs are UTF-16 of these letters
    data = text.encode()
    if data.count(0) * 4 < len(data):
      require_utf8("a.txt", data)


def test_utf8_may_contain_a_few_nuls():
  require_utf8("a.txt", b"a\0b\0\0c, and more text\0" * 20)
