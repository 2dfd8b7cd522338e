"""Turns JSON Lines, .json.gz and plain text into the TFRecord shards that mixtures read.

    python tools/prepare_text.py --input='corpus/*.json.gz' --output_dir=data/wiki

writes data/wiki/{train,validation}-00000-of-00032.tfrecord ... with `id` and `text`. This process
reads and writes; workers parse. The result does not depend on how many there are.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import gzip
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from ll3m.core import flags, stderr
from ll3m.core.storage import require_bucket
from ll3m.data.files import SPLITS, list_files
from ll3m.data.text_processor import parse_json
from ll3m.data.unusable import Skipped, Unusable, require_unicode

_JSON = (".jsonl", ".json", ".ndjson")
_PLAIN = (".txt", ".text", ".md", ".rst")
_BLOCK = 1 << 23  # bytes that a worker parses at a time


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """The flags of this tool."""

  input: tuple[str, ...] = flags.option(
    (), f"File or glob, may be repeated: {', '.join(_JSON + _PLAIN)}, also with .gz.", repeated=True
  )
  output_dir: str | None = flags.option(
    None, "Folder of the shards, local or gs://: {data_dir}/{source}, e.g. data/wiki."
  )
  num_shards: int = flags.option(32, "Files per split.")
  validation_fraction: float = flags.option(
    0.01, "Share of the documents that is held out, evenly spread; 0 writes no validation split."
  )
  text_field: str = flags.option("text", "Field of a JSON object that holds its text.")
  id_field: str = flags.option("id", "Field that holds its id; where missing, file:line is used.")
  plain_text: str = flags.option(
    "file", "What a document of a plain text file is.", choices=("file", "paragraph", "line")
  )
  workers: int = flags.option(os.cpu_count() or 1, "Processes that parse.")
  strict: bool = flags.option(
    False, "Stop at the first document that cannot be used instead of skipping it."
  )

  def __post_init__(self):
    for name in ("num_shards", "workers"):
      if getattr(self, name) < 1:
        raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
    if not 0 <= self.validation_fraction <= 0.5:
      raise ValueError(
        f"--validation_fraction must lie between 0 and 0.5, got {self.validation_fraction}"
      )


class Block(NamedTuple):
  """A piece of a file that ends where a line does."""

  file: str
  kind: str  # "json", or what a document of plain text is
  first_line: int
  data: bytes


class Parsed(NamedTuple):
  """What a worker made of a block."""

  documents: list[tuple[str, str]]  # id, text
  skipped: list[tuple[str, str]]  # place, reason


flags.define("", PrepareConfig)


def main() -> None:
  """Reads the flags, writes the shards, says what was skipped."""
  config = flags.read("", PrepareConfig)
  flags.require(config.input, "input")
  flags.require(config.output_dir, "output_dir")
  files = [file for pattern in config.input for file in list_files(pattern, "--input")]
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
  """Writes all shards; they get their names only when all are complete.

  Returns:
    How many documents each split got, and what was skipped.

  Raises:
    ValueError: if a split would be empty, or a document is unusable and none may be skipped.
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
  # Every so many documents, one is held out.
  stride = round(1 / config.validation_fraction) if config.validation_fraction else None
  counts, skipped = dict.fromkeys(splits, 0), Skipped(strict=config.strict)
  parts = {split: [target / f"{name}.part" for name in names[split]] for split in splits}
  try:
    with contextlib.ExitStack() as stack:
      writers = {
        split: [stack.enter_context(tf.io.TFRecordWriter(os.fspath(part))) for part in parts[split]]
        for split in splits
      }
      for parsed in parse_all(config, kinds):
        for place, reason in parsed.skipped:
          skipped.add(place, reason)
        for identity, text in parsed.documents:
          number = sum(counts.values())
          held_out = stride is not None and number % stride == stride - 1
          split = splits[held_out]
          writers[split][counts[split] % config.num_shards].write(example(identity, text))
          counts[split] += 1
    if empty := [split for split in splits if not counts[split]]:
      raise ValueError(
        f"no document for the {empty[0]} split: {sum(counts.values())} in all, "
        f"{skipped.describe() or 'skipped none'}, "
        f"--validation_fraction={config.validation_fraction}"
      )
  except BaseException:
    for part in itertools.chain(*parts.values()):
      part.unlink(missing_ok=True)
    raise
  for split in splits:
    for part, name in zip(parts[split], names[split], strict=True):
      part.rename(target / name)
  return counts, skipped


def parse_all(config: PrepareConfig, kinds: dict[str, str]) -> Iterator[Parsed]:
  """Parses every file in parallel and yields the results in the files' order."""
  sizes = {file: epath.Path(file).stat().length for file in kinds}
  # Not forked: a process with TensorFlow's threads must not be.
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
  """Cuts a file into blocks of whole lines; plain files whose document is the file stay whole.

  Raises:
    ValueError: if a compressed file is damaged.
  """
  line, rest = 1, b""
  by_line = kind in ("json", "line")
  with epath.Path(file).open("rb") as raw:
    stream = gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else raw
    while True:
      start = raw.tell()
      try:
        data = stream.read(_BLOCK if by_line else -1)
      except (OSError, EOFError) as error:
        raise ValueError(f"{file} is not a complete gzip file: {error}") from error
      bar.update(raw.tell() - start)
      whole, end, rest = (rest + data).rpartition(b"\n") if by_line and data else (rest, data, b"")
      if whole or end:
        yield Block(file, kind, line, whole + end)
        line += whole.count(b"\n") + 1
      if not data:
        return


def parse(block: Block, text_field: str, id_field: str) -> Parsed:
  """Turns a block into documents; runs in a worker."""
  documents, skipped = [], []
  for line, piece in _pieces(block):
    try:
      identity, text = f"{os.path.basename(block.file)}:{line}", None
      if block.kind == "json":
        found = parse_json(piece)
        if text_field not in found:
          raise Unusable(f"no field {text_field!r}")
        text = found[text_field]
        identity = str(found.get(id_field, identity))
        if not isinstance(text, str):
          raise Unusable(f"field {text_field!r} is not text")
      else:
        text = _decode(piece)
      if not text.strip():
        raise Unusable("empty text")
      require_unicode(identity + text)
      documents.append((identity, text))
    except Unusable as reason:
      skipped.append((f"{block.file}:{line}", str(reason)))
  return Parsed(documents, skipped)


def _pieces(block: Block) -> Iterator[tuple[int, bytes]]:
  """Yields documents with their line numbers; blank lines between them are none."""
  if block.kind == "file":
    yield block.first_line, block.data
    return
  separator = b"\n\n" if block.kind == "paragraph" else b"\n"
  line = block.first_line
  for piece in block.data.replace(b"\r\n", b"\n").split(separator):
    if piece.strip():
      yield line, piece
    line += piece.count(b"\n") + separator.count(b"\n")


def _decode(piece: bytes) -> str:
  try:
    return piece.decode("utf-8").strip("\n")
  except UnicodeDecodeError:
    raise Unusable("not UTF-8") from None


def _kind(file: str, plain_text: str) -> str:
  name = file.removesuffix(".gz")
  if name.endswith(_JSON):
    return "json"
  if name.endswith(_PLAIN):
    return plain_text
  raise ValueError(
    f"--input expects files that end in {', '.join(_JSON + _PLAIN)}, also with .gz, got {file}"
  )


if __name__ == "__main__":
  flags.run(main)
