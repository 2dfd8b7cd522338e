"""Turns rows (JSON Lines, JSON arrays, CSV, parquet) and plain text into TFRecord shards.

    python tools/prepare_text.py --input='corpus/*.json.gz' --output_dir=data/wiki

writes data/wiki/{train,validation}-00000-of-00032.tfrecord ... with `id` and `text`, for mixtures.
The main process reads and writes, and worker processes parse. The result does not depend on the
number of workers.
"""

import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import fractions
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from ll3m.core import flags, options, stderr
from ll3m.core.object_store import require_bucket
from ll3m.data.row_files import KINDS, as_row, is_array, kind_of, open_rows
from ll3m.data.shard_files import SPLITS, list_files
from ll3m.data.skipped_examples import Skipped, Unusable, require_unicode
from ll3m.data.text_files import (
  HEAD,
  decode_text,
  open_stream,
  require_utf8,
  split_lines,
  split_text,
)

_BLOCK = 1 << 23  # bytes that a worker parses at a time


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """The flags of this tool."""

  input: tuple[str, ...] = options.option(
    (),
    f"File or glob to read: {', '.join(KINDS)}, also with .gz or .zst; may be repeated.",
    repeated=True,
  )
  output_dir: str | None = options.option(
    None, "Output folder of the shards, local or gs://: {data_dir}/{source}, e.g. data/wiki."
  )
  num_shards: int = options.option(32, "Number of files per split.")
  validation_fraction: float = options.option(
    0.01,
    "Fraction of the documents to hold out, evenly spread; at least one of two or more documents. "
    "0 writes no validation split.",
  )
  text_field: str = options.option("text", "Field of a row that contains the text.")
  id_field: str = options.option(
    "id",
    "Field of a row that contains the id. If missing, the id is file:line (CSV and parquet: "
    "file:row).",
  )
  plain_text: str = options.option(
    "file", "Unit of plain text that becomes a document.", choices=("file", "paragraph", "line")
  )
  workers: int = options.option(os.cpu_count() or 1, "Number of processes that parse.")
  strict: bool = options.option(
    False, "Stop at the first unusable document instead of skipping it."
  )

  def __post_init__(self):
    for name in ("num_shards", "workers"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
    if not 0 <= self.validation_fraction <= 0.5:
      raise ValueError(
        f"`validation_fraction` must lie between 0 and 0.5, got {self.validation_fraction}"
      )


class Block(NamedTuple):
  """A part of a file that ends at the end of a line or row."""

  file: str
  kind: str  # "json", "rows", or the unit of plain text
  first_line: int
  data: bytes | list[tuple[int, bytes]]  # for "rows", rows with their numbers; else bytes


class Parsed(NamedTuple):
  """A worker's result for a block."""

  documents: list[tuple[str, str]]  # id, text
  skipped: list[tuple[str, str]]  # place, reason


FLAG_GROUPS = {"": PrepareConfig}


def main(argv: Sequence[str] | None = None) -> int:
  """Writes text shards; see `flags.call` for `argv` and the exit code that it returns."""
  return flags.call(_prepare, FLAG_GROUPS, argv, doc=__doc__)


def _prepare(given: flags.Flags) -> None:
  """Writes the shards, and prints how many documents were written and skipped."""
  config = given[""]
  options.require(config, "input", "output_dir")
  files = [file for pattern in config.input for file in list_files(pattern, "input")]
  kinds = {file: _kind(file, config.plain_text) for file in files}
  target = epath.Path(config.output_dir)
  require_bucket(target)
  splits = SPLITS if config.validation_fraction else SPLITS[:1]
  for split in splits:
    if any(target.glob(f"{split}-*.tfrecord")):
      raise ValueError(f"{target} already holds shards of {split}: choose another --output_dir")
  counts, skipped = write(config, kinds, target, splits)
  print(", ".join(f"{split}: {counts[split]:,} documents" for split in splits))
  print(skipped.describe() or "skipped none")


def write(
  config: PrepareConfig, kinds: dict[str, str], target: epath.Path, splits: tuple[str, ...]
) -> tuple[dict[str, int], Skipped]:
  """Writes all shards, which get their final names only when all are complete.

  Returns:
    The number of documents in each split, and the skipped documents.

  Raises:
    ValueError: A split would be empty, or a document is unusable and none may be skipped.
  """
  with stderr.tensorflow_import():
    import tensorflow as tf

  def example(identity: str, text: str) -> bytes:
    def feature(value: str) -> Any:
      return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))

    features = tf.train.Features(feature={"id": feature(identity), "text": feature(text)})
    return tf.train.Example(features=features).SerializeToString(deterministic=True)

  target.mkdir(parents=True, exist_ok=True)
  names = {
    split: [
      f"{split}-{i:05d}-of-{config.num_shards:05d}.tfrecord" for i in range(config.num_shards)
    ]
    for split in splits
  }
  share = fractions.Fraction(repr(config.validation_fraction))  # 0.4 is two fifths, not a float
  counts, skipped = dict.fromkeys(splits, 0), Skipped(strict=config.strict)
  parts = {split: [target / f"{name}.part" for name in names[split]] for split in splits}
  try:
    with contextlib.ExitStack() as stack:
      writers = {
        split: [stack.enter_context(tf.io.TFRecordWriter(os.fspath(part))) for part in parts[split]]
        for split in splits
      }

      def add(split: str, document: tuple[str, str]) -> None:
        writers[split][counts[split] % config.num_shards].write(example(*document))
        counts[split] += 1

      last = None  # gets its split when another document shows that it is not the last
      for parsed in parse_all(config, kinds):
        for place, reason in parsed.skipped:
          skipped.add(place, reason)
        for document in parsed.documents:
          if last:
            add(_split(sum(counts.values()), share), last)
          last = document
      if last:
        lacks = share and counts["train"] and not counts["validation"]
        add("validation" if lacks else _split(sum(counts.values()), share), last)
    if empty := [split for split in splits if not counts[split]]:
      raise ValueError(
        _describe_empty(empty[0], sum(counts.values()), skipped, set(kinds.values()))
      )
  except BaseException:
    for part in itertools.chain(*parts.values()):
      part.unlink(missing_ok=True)
    raise
  for split in splits:
    for part, name in zip(parts[split], names[split], strict=True):
      part.rename(target / name)
  return counts, skipped


def _split(number: int, share: fractions.Fraction) -> str:
  """Returns a document's split; exactly floor(n * share) of the first n documents are held out."""
  return SPLITS[int((number + 1) * share) > int(number * share)]


def _describe_empty(split: str, count: int, skipped: Skipped, kinds: set[str]) -> str:
  """Returns the error message for an empty split, with the flags that avoid it."""
  what = (
    f"no document for the {split} split: {count} in total, {skipped.describe() or 'skipped none'}"
  )
  if not count:
    return what
  cut = ", or --plain_text=paragraph to split files into documents" if "file" in kinds else ""
  return f"{what}; set --validation_fraction=0 to write only the train split{cut}"


def parse_all(config: PrepareConfig, kinds: dict[str, str]) -> Iterator[Parsed]:
  """Parses all files in parallel and yields the results in the order of the files."""
  sizes = {file: epath.Path(file).stat().length for file in kinds}
  # Workers are not forked: a process with TensorFlow's threads must not be forked.
  context = multiprocessing.get_context("spawn")
  with (
    tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=None) as bar,
    concurrent.futures.ProcessPoolExecutor(config.workers, mp_context=context) as pool,
  ):
    waiting = collections.deque()
    for block in itertools.chain.from_iterable(blocks(f, kinds[f], bar) for f in kinds):
      waiting.append(pool.submit(parse, block, config.text_field, config.id_field))
      if len(waiting) > 2 * config.workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def blocks(file: str, kind: str, bar: tqdm) -> Iterator[Block]:
  """Splits a file into blocks of rows or lines; a text file of paragraphs is a single block.

  Raises:
    ValueError: The file is damaged.
  """
  if kind == "rows":
    yield from _row_blocks(file)
    bar.update(epath.Path(file).stat().length)
    return
  line, rest = 1, b""
  by_line = kind in ("json", "line")
  with open_stream(file) as (stream, raw):
    while True:
      start = raw.tell()
      data = stream.read(_BLOCK if by_line else -1)
      bar.update(raw.tell() - start)
      whole, end, rest = (rest + data).rpartition(b"\n") if by_line and data else (rest, data, b"")
      if whole or end:
        yield Block(file, kind, line, whole + end)
        line += whole.count(b"\n") + 1
      if not data:
        return


def _row_blocks(file: str) -> Iterator[Block]:
  """Yields the rows of an array or table in blocks; the file is read as a whole."""
  rows, waiting, size = open_rows(file), [], 0
  for number, start, end in rows.positions:
    waiting.append((number, rows.read(start, end)))
    size += len(str(waiting[-1][1]))
    if size >= _BLOCK:
      yield Block(file, "rows", 1, waiting)
      waiting, size = [], 0
  if waiting:
    yield Block(file, "rows", 1, waiting)


def parse(block: Block, text_field: str, id_field: str) -> Parsed:
  """Converts a block to documents; runs in a worker."""
  documents, skipped = [], []
  for line, piece in _pieces(block):
    try:
      identity, text = f"{os.path.basename(block.file)}:{line}", None
      if block.kind in ("json", "rows"):
        found = as_row(piece)
        if text_field not in found:
          raise Unusable(f"no field {text_field!r}")
        text = found[text_field]
        identity = str(found.get(id_field, identity))
        if not isinstance(text, str):
          raise Unusable(f"field {text_field!r} is not text")
      else:
        text = _decode(piece, block.kind)
      if not text.strip():
        raise Unusable("empty text")
      require_unicode(identity + text)
      documents.append((identity, text))
    except Unusable as reason:
      skipped.append((f"{block.file}:{line}", str(reason)))
  return Parsed(documents, skipped)


def _pieces(block: Block) -> Iterator[tuple[int, bytes]]:
  """Yields documents with their line numbers, without the blank lines between them."""
  if block.kind == "rows":
    yield from block.data
  elif block.kind == "file":
    yield 1, block.data.removeprefix(codecs.BOM_UTF8)  # even if it is blank
  else:
    parts = (
      split_lines(block.data, block.first_line)
      if block.kind == "json"
      else split_text(block.data, block.kind, block.first_line)
    )
    for line, start, end in parts:
      piece = block.data[start:end]
      if piece.strip():
        yield line, piece


def _decode(piece: bytes, kind: str) -> str:
  try:
    return piece.decode() if kind == "line" else decode_text(piece)
  except UnicodeDecodeError:
    raise Unusable("not UTF-8") from None


def _kind(file: str, plain_text: str) -> str:
  """Returns the kind of a file's blocks.

  Raises:
    ValueError: Neither its name nor its content determines the kind, or it is UTF-16 or UTF-32.
  """
  with open_stream(file) as (stream, _):
    head = stream.read(HEAD)
  kind = kind_of(file, head)
  if kind is None:
    raise ValueError(
      f"`input` expects files that end in {', '.join(KINDS)}, also with .gz or .zst, got {file}"
    )
  if kind != "parquet":
    require_utf8(file, head)
  if kind == "text":
    return plain_text
  return "json" if kind == "json" and not is_array(head) else "rows"


if __name__ == "__main__":
  sys.exit(main())
