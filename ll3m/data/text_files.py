r"""Text files that may be compressed or have a byte order mark or Windows line endings.

All readers of lines use this module, so that training, prompts and `tools/prepare_text.py` read a
file in the same way. Only \n and \r\n end a line. U+2028, U+0085, \x0b, \x0c and a lone \r, at
which `str.splitlines` would split, are part of a line.
"""

import codecs
import contextlib
import gzip
import io
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, override

import zstandard
from etils import epath

from ll3m.core.object_store import is_remote

# Extensions of compressed files, with the names of the formats and the first bytes of the files.
COMPRESSIONS = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("Zstandard", b"\x28\xb5\x2f\xfd")}

# UTF-32 first: its mark in little-endian order begins with that of UTF-16.
_MARKS = (
  ("UTF-32", codecs.BOM_UTF32_LE),
  ("UTF-32", codecs.BOM_UTF32_BE),
  ("UTF-16", codecs.BOM_UTF16_LE),
  ("UTF-16", codecs.BOM_UTF16_BE),
)
# Number of bytes that determine the kind and the encoding of a file.
HEAD = 4096
# Window of `zstd -19 --long=31`, which is used for archives; the default limit is 2**27.
_MAX_WINDOW = 1 << 31


class _ZstdFile(io.RawIOBase):
  """Reader that decompresses consecutive frames, like `zstd`.

  The readers of `zstandard` accept a file that ends within a frame as complete.
  """

  def __init__(self, raw: BinaryIO):
    self._raw, self._frame, self._ready = raw, None, b""

  @override
  def readable(self) -> bool:
    return True

  @override
  def readinto(self, target: Any) -> int:
    while not self._ready:
      data = self._raw.read(io.DEFAULT_BUFFER_SIZE)
      if not data:
        if self._frame:
          raise EOFError("it ends within a frame")
        return 0
      self._ready = self._decompress(data)
    count = min(len(target), len(self._ready))
    target[:count] = self._ready[:count]
    self._ready = self._ready[count:]
    return count

  def _decompress(self, data: bytes) -> bytes:
    pieces = []
    while data:
      frame = self._frame or _decompressor()
      pieces.append(frame.decompress(data))
      self._frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
    return b"".join(pieces)


def _decompressor() -> Any:
  return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()


def compression(file: str, head: bytes) -> str | None:
  """Returns the extension that belongs to a file's compression, or None if it is not compressed.

  Args:
    file: Name of the file, whose extension determines the compression if it is in `COMPRESSIONS`.
    head: First bytes of the file, which determine the compression otherwise.
  """
  named = next((ending for ending in COMPRESSIONS if file.lower().endswith(ending)), None)
  return named or next(
    (e for e, (_, magic) in COMPRESSIONS.items() if head.startswith(magic)), None
  )


@contextlib.contextmanager
def open_stream(file: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
  """Opens a file for reading; yields a stream of the decompressed content and the stored file.

  Raises:
    ValueError: A compressed file is damaged or ends early; also raised while reading the stream.
  """
  with contextlib.ExitStack() as stack:
    raw = stack.enter_context(epath.Path(file).open("rb"))
    ending = compression(file, raw.read(4))
    raw.seek(0)
    if ending is None:
      yield raw, raw
      return
    stream = gzip.GzipFile(fileobj=raw) if ending == ".gz" else io.BufferedReader(_ZstdFile(raw))
    try:
      yield stream, raw
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
      kind, _ = COMPRESSIONS[ending]
      raise ValueError(f"{file} is not a complete {kind} file: {error}") from error


def read_bytes(file: str) -> bytes | mmap.mmap:
  """Memory-maps a local uncompressed file; reads a compressed or remote file into memory.

  Raises:
    ValueError: A compressed file is damaged or ends early.
  """
  with open_stream(file) as (stream, raw):
    if stream is raw and not is_remote(file) and os.path.getsize(file):
      return mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    return stream.read()


def require_utf8(file: str, data: bytes | mmap.mmap) -> None:
  """Checks that a file is not UTF-16 or UTF-32.

  Other encodings are detected only at characters that they encode differently, line by line.

  Args:
    file: Name of the file, for messages.
    data: Content of the file, or its beginning.

  Raises:
    ValueError: The file is UTF-16 or UTF-32; the message has the command that converts it.
  """
  head = data[:HEAD]
  name = next((name for name, mark in _MARKS if head.startswith(mark)), None) or _wide(head)
  if name:
    raise ValueError(f"{file} is {name}: convert it with `iconv -f {name} -t UTF-8`")


def _wide(head: bytes) -> str | None:
  """Returns the UTF-16 or UTF-32 encoding of mostly ASCII text without a mark, or None."""
  quarter = len(head) // 4
  zeros = [head[place::4].count(0) > quarter * 0.7 for place in range(4)] if quarter else []
  return {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
  }.get(tuple(zeros))


def split_lines(data: bytes | mmap.mmap, first: int = 1) -> Iterator[tuple[int, int, int]]:
  r"""Yields the number, start and end of every line, without the \n or \r\n that ends it.

  Args:
    data: Content of a file, or a part of it; a byte order mark before line 1 is skipped.
    first: Number of the first line.
  """
  start = len(codecs.BOM_UTF8) if first == 1 and data[:3] == codecs.BOM_UTF8 else 0
  length, find, line = len(data), data.find, first
  while start < length:
    newline = find(b"\n", start)
    if newline < 0:
      yield line, start, length
      return
    end = newline - 1 if newline > start and data[newline - 1] == 13 else newline
    yield line, start, end
    start, line = newline + 1, line + 1


_BLANK_LINE = re.compile(rb"(?:\r\n|\r(?!\n)|\n){2}")


def split_text(
  data: bytes | mmap.mmap, unit: str, first: int = 1
) -> Iterator[tuple[int, int, int]]:
  r"""Yields the line, start and end of every document of plain text that is not blank.

  Args:
    data: Content of a file, or a part of it.
    unit: "file", "paragraph" or "line". Paragraphs are separated by blank lines. For files and
      paragraphs, a lone \r (the line end of old Macs) ends a line too.
    first: Number of the first line.
  """
  if unit == "line":
    for line, start, end in split_lines(data, first):
      if data[start:end].strip():
        yield line, start, end
    return
  start = len(codecs.BOM_UTF8) if first == 1 and data[:3] == codecs.BOM_UTF8 else 0
  line, ends = first, [] if unit == "file" else _BLANK_LINE.finditer(data, start)
  for match in (*ends, None):
    end = match.start() if match else len(data)
    piece = data[start:end]
    if piece.strip():
      yield line, start, end
    if match:
      line += _count_lines(piece + match[0])
      start = match.end()


def _count_lines(piece: bytes) -> int:
  return piece.count(b"\n") + piece.count(b"\r") - piece.count(b"\r\n")


def decode_text(piece: bytes) -> str:
  r"""Decodes a document of plain text: every line end becomes \n, and those at its ends go.

  Raises:
    UnicodeDecodeError: It is not UTF-8.
  """
  return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode().strip("\n")
