"""Sources of rows: what the option `data` names, found on disk, in a bucket or on the Hub.

    my/*.jsonl                             files, a glob or a folder
    a.jsonl=0.7,b.parquet=0.3              several, with weights
    my/dataset:test                        a split of a folder
    HuggingFaceH4/no_robots:train          a dataset of the Hub, NAME[:CONFIGURATION][:SPLIT]
    data/wiki                              a folder of TFRecord shards
    mixture:wikipedia_mixture              a seqio mixture or task

This module opens no data file, except the `state.json` of a folder that `save_to_disk` wrote.
"""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Sequence

from etils import epath

from ll3m.core.object_store import is_remote
from ll3m.data.row_files import KINDS, kind_of
from ll3m.data.shard_files import list_files

MIXTURE = "mixture:"
_WEIGHTED = re.compile(r"(.+)=([-+.\w]+)")
_SHARD = re.compile(r"(\w+)-\d+-of-\d+\.tfrecord")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Files of dataset folders that are not data.
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# Words that name a split in the name of a file or folder, as in `datasets`.
_SPLIT_WORDS = {
  "train": "train", "training": "train",
  "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
  "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
  """One source of rows.

  Attributes:
    name: Its name for messages, as it was given.
    weight: Its weight among the sources; None if no source has one.
    files: Its files; empty for a dataset of the Hub.
    hub: Arguments (path, configuration, split) of `datasets.load_dataset`, or None.
  """

  name: str
  weight: float | None = None
  files: tuple[str, ...] = ()
  hub: tuple[str, str | None, str] | None = None


@dataclasses.dataclass(frozen=True)
class ShardFolder:
  """A folder of TFRecord shards: {data_dir}/{name}/{split}-00000-of-00032.tfrecord ..."""

  data_dir: str
  name: str


def parse(data: str) -> list[tuple[str, float | None]]:
  """Splits the option `data` into names and weights.

  Raises:
    ValueError: A name is empty, a weight is not a positive number, or only some names have one.
  """
  found = []
  for item in [data] if _is_local(data) else _split_at_commas(data):
    name, weight = item.strip(), None
    match = _WEIGHTED.fullmatch(name)
    if match and not _is_local(name):
      name, weight = match[1].strip(), _parse_weight(name, match[2])
    if not name:
      raise ValueError(f"`data` has an empty name between commas: {data!r}")
    found.append((name, weight))
  without = [name for name, weight in found if weight is None]
  if without and len(without) < len(found):
    raise ValueError(
      f"`data`: {without[0]} has no weight, but others have: give a weight to every source, as in "
      f"{without[0]}=0.5, or to none"
    )
  return found


def _split_at_commas(text: str) -> list[str]:
  """Splits at commas outside of brackets, which slices and globs may contain."""
  return re.split(r",(?![^\[{]*[\]}])", text)


def _parse_weight(item: str, text: str) -> float:
  try:
    weight = float(text)
  except ValueError:
    weight = math.nan
  if not 0 < weight < math.inf:
    raise ValueError(f"`data`: the weight in {item} must be a positive number, got {text!r}")
  return weight


def find(data: str, *, split_default: str) -> list[Source] | ShardFolder:
  """Finds everything that the option `data` names, except a mixture.

  Args:
    data: The option's value.
    split_default: Split to read from folders and datasets with splits if no split is named.

  Raises:
    ValueError: A name or weight is malformed, or names cannot be combined.
    FileNotFoundError: Nothing has this name; the message has the nearest name.
  """
  named = parse(data)
  found = [_find_one(name, weight, split_default) for name, weight in named]
  alone = next((n for (n, _), f in zip(named, found, strict=True) if _is_alone(n, f)), None)
  if alone is None:
    return found
  if len(named) > 1 or named[0][1] is not None:
    raise ValueError(
      f"`data`: {alone} holds TFRecord shards or is a mixture, which cannot be weighted or "
      "combined here: define a seqio mixture (docs/dataset.md)"
    )
  return found[0]


def _is_alone(name: str, found: Source | ShardFolder) -> bool:
  return isinstance(found, ShardFolder) or name.startswith(MIXTURE)


def _find_one(name: str, weight: float | None, split_default: str) -> Source | ShardFolder:
  name = os.path.expanduser(name)
  if name.startswith(MIXTURE):
    return Source(name, weight)
  if any(character in name for character in "*?[") and not _is_slice(name):
    return Source(name, weight, tuple(_data_files(list_files(name, "data"), name)))
  path, split = name, None
  if not _exists(name) and ":" in name.removeprefix("gs://"):
    path, _, split = name.rpartition(":")
  if _exists(path):
    folder = epath.Path(path)
    if folder.is_dir():
      return _find_in_folder(folder, name, weight, split, split_default)
    if split is None:
      return Source(name, weight, tuple(_data_files([path], name)))
  if is_remote(name) or kind_of(path) or path.startswith((".", "/", "~")):
    raise FileNotFoundError(f"`data`: no such file or folder: {name}{_nearest(path)}")
  return _find_on_hub(name, weight, split_default)


def _is_slice(name: str) -> bool:
  """Returns whether brackets are those of a split such as train[:10%]."""
  return re.search(r":\w+\[[-\d:%]*\]$", name) is not None and "*" not in name


def _find_in_folder(
  folder: epath.Path, name: str, weight: float | None, split: str | None, split_default: str
) -> Source | ShardFolder:
  inside = {path.name: path for path in folder.iterdir()}
  if "dataset_dict.json" in inside:
    splits = sorted(n for n, path in inside.items() if (path / "state.json").exists())
    chosen = _choose_split(splits, split, split_default, name)
    return Source(name, weight, _saved_files(inside[chosen]))
  if "state.json" in inside:
    if split is not None:
      raise ValueError(f"`data`: {folder} has no splits, got {name}")
    return Source(name, weight, _saved_files(folder))
  if any(_SHARD.fullmatch(file) for file in inside):
    if split is not None:
      raise ValueError(
        f"`data`: for TFRecord shards the split is set by `seqio_dataset.split`, got {name}"
      )
    return ShardFolder(os.fspath(folder.parent), folder.name)
  files = [path for path in _walk(folder) if path.name not in _NOT_DATA and kind_of(path.name)]
  rows = [path for path in files if kind_of(path.name) != "text"]
  by_split: dict[str | None, list[str]] = {}
  for path in rows or files:
    relative = os.fspath(path)[len(os.fspath(folder)) :]
    by_split.setdefault(_split_of(relative), []).append(os.fspath(path))
  splits = sorted(word for word in by_split if word)
  if not by_split:
    raise FileNotFoundError(
      f"`data`: {folder} holds no file of the kinds {', '.join(KINDS)}, also with .gz or .zst"
    )
  chosen = _choose_split(splits, split, split_default, name) if splits or split else None
  return Source(name, weight, tuple(by_split[chosen]))


def _walk(folder: epath.Path) -> list[epath.Path]:
  """Returns all files below a folder, sorted, without hidden ones."""
  found = []
  for path in sorted(folder.iterdir()):
    if not path.name.startswith("."):
      found += _walk(path) if path.is_dir() else [path]
  return found


def _split_of(relative: str) -> str | None:
  """Returns the split that a path names as `train-00000.parquet` or `test/a.json` do, or None."""
  words = re.split(r"[-._ 0-9/]+", relative.lower())
  return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _choose_split(splits: Sequence[str], split: str | None, split_default: str, name: str) -> str:
  wanted = split or split_default
  if wanted not in splits:
    named = "no splits" if not splits else f"the splits {', '.join(splits)}"
    example = f"; name one as {name}:{splits[0]}" if splits and not split else ""
    raise ValueError(f"`data`: {name.rpartition(':')[0] if split else name} has {named}, not "
                     f"{wanted!r}{example}")  # fmt: skip
  return wanted


def _saved_files(folder: epath.Path) -> tuple[str, ...]:
  """Returns the Arrow files of a dataset that `datasets.Dataset.save_to_disk` wrote."""
  try:
    listed = json.loads((folder / "state.json").read_text())["_data_files"]
    files = tuple(os.fspath(folder / file["filename"]) for file in listed)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"`data`: {folder}/state.json is damaged: {error!r}") from error
  missing = [file for file in files if not epath.Path(file).exists()]
  if missing or not files:
    raise FileNotFoundError(f"`data`: {missing[0] if missing else f'files of {folder}'} is missing")
  return files


def _data_files(files: Sequence[str], name: str) -> Sequence[str]:
  """Checks that a glob matches data only; a glob such as `my/*` may match other files too.

  Raises:
    ValueError: TFRecord shards are matched, which are read as a folder.
  """
  if any(file.endswith(".tfrecord") for file in files):
    raise ValueError(f"`data`: give the folder of TFRecord shards, not {name}")
  return files


def _find_on_hub(name: str, weight: float | None, split_default: str) -> Source:
  path, *rest = name.split(":", 2) if not name.endswith("]") else _split_slice(name)
  if not _HUB_NAME.fullmatch(path) or len(rest) > 2 or not all(rest):
    raise FileNotFoundError(
      f"`data`: {name} is neither a file or folder nor the name of a Hugging Face dataset"
      f"{_nearest(name)}"
    )
  configuration = rest[0] if len(rest) == 2 else None
  return Source(name, weight, hub=(path, configuration, rest[-1] if rest else split_default))


def _split_slice(name: str) -> list[str]:
  """Splits NAME:CONFIGURATION:train[:10%], whose slice has a colon too."""
  head, bracket, tail = name.partition("[")
  parts = head.split(":", 2)
  return [*parts[:-1], parts[-1] + bracket + tail]


def _nearest(path: str) -> str:
  """Returns `; did you mean ...?` with the most similar name in the same folder, or ""."""
  folder, _, last = path.rpartition("/")
  parent = epath.Path(folder or ("/" if path.startswith("/") else "."))
  if is_remote(path) or not parent.is_dir():
    return ""
  names = [entry.name for entry in parent.iterdir()]
  close = difflib.get_close_matches(last, names, n=1)
  return f"; did you mean {f'{folder}/' if folder else ''}{close[0]}?" if close else ""


def _is_local(path: str) -> bool:
  return not is_remote(path) and _exists(path)


def _exists(path: str) -> bool:
  return not path.startswith(MIXTURE) and epath.Path(path).exists()
