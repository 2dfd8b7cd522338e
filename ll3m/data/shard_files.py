"""Listing of data files: the files of a glob and the shards of a source."""

import os
import re

from etils import epath

# Splits of the text shards and of the built-in tasks.
SPLITS = ("train", "validation")


def default_data_dir() -> str:
  """Returns $LL3M_DATA_DIR, or ./data."""
  return os.environ.get("LL3M_DATA_DIR") or "data"


def text_shards(data_dir: str | None, source: str, split: str) -> list[str]:
  """Lists all TFRecord shards of a source in order.

  Args:
    data_dir: Local or gs:// folder; None for `default_data_dir()`.
    source: Name of a sub-folder, e.g. "wiki".
    split: "train" or "validation".

  Raises:
    FileNotFoundError: The folder or a shard of the set is missing.
  """
  root = epath.Path(data_dir or default_data_dir())
  found = {}
  for path in (root / source).glob(f"{split}-*-of-*.tfrecord"):
    if match := re.fullmatch(rf"{split}-(\d+)-of-(\d+)\.tfrecord", path.name):
      found[int(match[1]), int(match[2])] = os.fspath(path)
  counts = {count for _, count in found}
  expected = max(counts, default=32)
  missing = [number for number in range(expected) if (number, expected) not in found]
  if missing or len(found) != expected:
    if not found and not root.exists():
      raise FileNotFoundError(
        f"`data_dir` {root} does not exist: set `data_dir` or LL3M_DATA_DIR (see docs/dataset.md)"
      )
    first = f", {missing[0]:05d} is missing" if found and missing else ""
    raise FileNotFoundError(
      f"expected {expected} shards {root / source}/{split}-00000-of-{expected:05d}.tfrecord ..., "
      f"found {len(found)}{first} (see docs/dataset.md)"
    )
  return [found[key] for key in sorted(found)]


def list_files(path: str, option: str) -> list[str]:
  """Lists the files of a path or glob, sorted.

  Args:
    path: Path or glob, local or gs://.
    option: Name of the option that gave the path, for messages.

  Raises:
    FileNotFoundError: No file matches.
  """
  if epath.Path(path).exists() and not epath.Path(path).is_dir():
    return [path]  # even if the name contains wildcard characters
  files = []
  if any(character in path for character in "*?["):
    folder, _, pattern = path.rpartition("/")
    wild = next((i for i, part in enumerate(folder.split("/")) if re.search(r"[*?\[]", part)), None)
    if wild is not None:  # epath can only glob below a folder without wildcards
      parts = folder.split("/")
      folder, pattern = "/".join(parts[:wild]), "/".join([*parts[wild:], pattern])
    base = epath.Path(folder or ("/" if path.startswith("/") else "."))
    files = sorted(os.fspath(file) for file in base.glob(pattern) if not file.is_dir())
  if not files:
    raise FileNotFoundError(f"`{option}`: no file matches {path!r}")
  return files
