"""Dataset specification: the options of a dataset, the settings of the run and the files found.

This module does not import TensorFlow, except that etils imports it for gs:// paths.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from ll3m.core.model_config import did_you_mean
from ll3m.data import mixtures
from ll3m.data.config import DatasetConfig
from ll3m.data.shard_files import SPLITS, list_files, text_shards


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """A dataset checked by `resolve`: everything that determines what a stream reads.

  Attributes:
    config: The dataset's options.
    split_default: Name of the split to read if the options do not name one.
    repeat: Whether the stream restarts whenever it reaches its end.
    seed: Seed of shuffling and mixing.
    strict: Whether an unusable row of a json or huggingface dataset is an error.
    data_dir: Folder of the text shards; None for $LL3M_DATA_DIR, else ./data.
    files: Files found, by source of a mixture or by the path of a json dataset.
  """

  config: DatasetConfig
  split_default: str
  repeat: bool
  seed: int
  strict: bool
  data_dir: str | None
  files: Mapping[str, Sequence[str]]

  @property
  def split(self) -> str:
    """Name of the split to read."""
    return _split(self.config, self.split_default)

  @property
  def shuffle(self) -> bool:
    """Whether examples are shuffled; by default, only if the stream repeats."""
    shuffle = self.config.seqio_dataset.shuffle
    return self.repeat if shuffle is None else shuffle


def resolve(
  config: DatasetConfig,
  *,
  split_default: str = "train",
  repeat: bool = True,
  seed: int = 0,
  strict: bool = False,
  data_dir: str | None = None,
) -> DataSpec:
  """Checks a dataset's options and that its files exist; lists each folder once and reads nothing.

  Args:
    config: The dataset's options.
    split_default: See `DataSpec`.
    repeat: See `DataSpec`.
    seed: See `DataSpec`.
    strict: See `DataSpec`.
    data_dir: See `DataSpec`.

  Raises:
    ValueError: The mixture or split is unknown, or a required option is missing.
    FileNotFoundError: Files are missing.
  """
  options, kind = config.seqio_dataset, config.type
  name, value = {
    "json": ("json_dataset.path", config.json_dataset.path),
    "huggingface": ("huggingface_dataset.path", config.huggingface_dataset.path),
    "seqio": ("seqio_dataset.mixture_or_task_name", options.mixture_or_task_name),
  }[kind]
  if not value:
    raise ValueError(f"`{name}` must be given for a dataset of type {kind}")
  if kind == "json":
    files = {value: list_files(value, name)}
  elif kind == "huggingface":
    files = {}
  else:
    files = _mixture_files(
      value, _split(config, split_default), data_dir, is_known=not options.module
    )
  return DataSpec(
    config,
    split_default=split_default,
    repeat=repeat,
    seed=seed,
    strict=strict,
    data_dir=data_dir,
    files=files,
  )


def _split(config: DatasetConfig, default: str) -> str:
  options = config.huggingface_dataset if config.type == "huggingface" else config.seqio_dataset
  return options.split or default


def _mixture_files(
  name: str, split: str, data_dir: str | None, *, is_known: bool
) -> dict[str, list[str]]:
  """Lists the shards of each source of a mixture or task.

  Args:
    name: Name of the mixture or task.
    split: Name of the split.
    data_dir: See `DataSpec`.
    is_known: Whether the mixture or task must come with the library; if not, a user's module may
      register it.
  """
  known = mixtures.known_names()
  if name not in known:
    if not is_known:
      return {}
    raise ValueError(
      f"`seqio_dataset.mixture_or_task_name`: unknown mixture or task {name!r}"
      f"{did_you_mean(name, known)}; known: {', '.join(known)}"
    )
  if split not in SPLITS:
    raise ValueError(
      f"`seqio_dataset.split`: {name} has the splits {', '.join(SPLITS)}, got {split!r}"
    )
  return {
    source: text_shards(data_dir, source, split)
    for source in mixtures.sources_of(name)
    if source in mixtures.TEXT_SOURCES
  }
