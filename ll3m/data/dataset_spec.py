"""Dataset specification: the options of a dataset, the settings of the run and the files found.

This module does not import TensorFlow, except that etils imports it for gs:// paths.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from ll3m.core.model_config import did_you_mean
from ll3m.data import mixtures, sources
from ll3m.data.config import DEFAULT_SEED, DatasetConfig
from ll3m.data.shard_files import SPLITS, list_files, text_shards
from ll3m.data.sources import MIXTURE, ShardFolder, Source

_SHARDS = 8  # number of pipelines by default


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """A dataset checked by `resolve`: everything that determines what a stream reads.

  Attributes:
    config: The dataset's options. For `data`, its `type` is that of the stream: seqio for mixtures
      and TFRecord shards.
    split_default: Name of the split to read if the options do not name one.
    passes: Number of passes through the data; None for an endless stream.
    seed: Seed of shuffling and mixing.
    strict: Whether an unusable row is an error.
    data_dir: Folder of the text shards; None for $LL3M_DATA_DIR, else ./data.
    files: Shards found, by source of a mixture.
    sources: Sources of rows.
    is_evaluation: Whether the data is evaluated instead of trained on: it is not shuffled by
      default, and consists of the rows that `eval_fraction` holds out.
    eval_fraction: Fraction of the rows that are held out; 0 for none.
    count_tokens: Whether the tokens of all rows are counted when the data is opened.
    workers: Number of processes that count.
  """

  config: DatasetConfig
  split_default: str
  passes: int | None
  seed: int
  strict: bool
  data_dir: str | None
  files: Mapping[str, Sequence[str]]
  sources: Sequence[Source] = ()
  is_evaluation: bool = False
  eval_fraction: float = 0.0
  count_tokens: bool = False
  workers: int = 1

  @property
  def split(self) -> str:
    """Name of the split of a mixture."""
    return self.config.seqio_dataset.split or self.split_default

  @property
  def shuffle(self) -> bool:
    """Whether examples are shuffled; by default, only for training."""
    shuffle = self.config.seqio_dataset.shuffle
    return not self.is_evaluation if shuffle is None else shuffle

  @property
  def is_rows(self) -> bool:
    """Whether the data consists of rows, and not of a seqio mixture."""
    return bool(self.sources)

  @property
  def is_countable(self) -> bool:
    """Whether all rows are known when the data is opened, so that epochs can be counted."""
    return self.is_rows and not self.config.huggingface_dataset.streaming

  def counted(self, option: str = "epochs") -> "DataSpec":
    """Returns the dataset with the tokens of all rows counted when it is opened.

    Args:
      option: Name of the option that needs the counts.

    Raises:
      ValueError: The number of rows is unknown.
    """
    if not self.is_countable:
      what = "must be given for" if option == "eval_steps" else "cannot be used with"
      raise ValueError(f"`{option}` {what} mixtures and streams, whose number of rows is unknown")
    return dataclasses.replace(self, count_tokens=True)


def resolve(
  config: DatasetConfig,
  *,
  is_evaluation: bool = False,
  passes: int | None = None,
  seed: int = DEFAULT_SEED,
  strict: bool = False,
  data_dir: str | None = None,
  eval_fraction: float = 0.0,
  workers: int = 1,
) -> DataSpec:
  """Checks a dataset's options and that its files exist; lists each folder once and reads no data.

  Args:
    config: The dataset's options.
    is_evaluation: See `DataSpec`. Evaluation data is read once, and by default from the split
      "validation".
    passes: See `DataSpec`.
    seed: See `DataSpec`.
    strict: See `DataSpec`.
    data_dir: See `DataSpec`.
    eval_fraction: See `DataSpec`.
    workers: See `DataSpec`.

  Raises:
    ValueError: The mixture or split is unknown, a required option is missing, an option is invalid,
      or options cannot be combined.
    FileNotFoundError: Files are missing.
  """
  if not 0 <= eval_fraction <= 0.5:
    raise ValueError(f"`eval_fraction` must lie between 0 and 0.5, got {eval_fraction}")
  split_default = "validation" if is_evaluation else "train"
  if eval_fraction and config.data is not None:
    split_default = "train"  # both parts are those of the training data
  found, shards = _find(config, split_default)
  if shards is not None:
    data_dir, files = shards.data_dir, {shards.name: _shards(shards, config, split_default)}
    config = _as_mixture(config, shards.name)
  elif config.data is not None and config.data.startswith(MIXTURE):
    config = _as_mixture(config, config.data.removeprefix(MIXTURE))
  options = config.seqio_dataset
  if options.num_shards is None:
    options = dataclasses.replace(options, num_shards=1 if found and config.data else _SHARDS)
    config = dataclasses.replace(config, seqio_dataset=options)
  if shards is None:
    files = {}
    if not found:
      name = options.mixture_or_task_name
      split = options.split or split_default
      files = _mixture_files(name, split, data_dir, is_known=not options.module)
  spec = DataSpec(
    config,
    split_default=split_default,
    passes=1 if is_evaluation else passes,
    seed=seed,
    strict=strict,
    data_dir=data_dir,
    files=files,
    sources=tuple(found),
    is_evaluation=is_evaluation,
    eval_fraction=eval_fraction,
    workers=workers,
  )
  if config.huggingface_dataset.streaming and (len(found) != 1 or found[0].hub is None):
    raise ValueError("`huggingface_dataset.streaming` needs a single Hugging Face dataset")
  if eval_fraction and not spec.is_countable:
    raise ValueError(
      "`eval_fraction` needs data whose rows are known: files or downloaded datasets, not mixtures "
      "or streams"
    )
  return spec


def _find(config: DatasetConfig, split_default: str) -> tuple[list[Source], ShardFolder | None]:
  """Returns the sources of rows, or a folder of shards; neither for a mixture."""
  if config.data is not None:
    if not config.data.strip():
      raise ValueError("`data` must not be empty")
    if config.data.startswith(MIXTURE) and "," not in config.data:
      return [], None
    found = sources.find(config.data, split_default=split_default)
    return ([], found) if isinstance(found, ShardFolder) else (found, None)
  kind, hub = config.type, config.huggingface_dataset
  name, value = {
    "json": ("json_dataset.path", config.json_dataset.path),
    "huggingface": ("huggingface_dataset.path", hub.path),
    "seqio": ("seqio_dataset.mixture_or_task_name", config.seqio_dataset.mixture_or_task_name),
  }[kind]
  if not value:
    other = ", or `data`," if kind == "seqio" else ""
    raise ValueError(f"`{name}`{other} must be given for a dataset of type {kind}")
  if kind == "json":
    return [Source(value, files=tuple(list_files(value, name)))], None
  if kind == "huggingface":
    return [Source(value, hub=(value, hub.name, hub.split or split_default))], None
  return [], None


def _as_mixture(config: DatasetConfig, name: str) -> DatasetConfig:
  options = dataclasses.replace(config.seqio_dataset, mixture_or_task_name=name)
  return dataclasses.replace(config, type="seqio", seqio_dataset=options)


def _shards(folder: ShardFolder, config: DatasetConfig, split_default: str) -> list[str]:
  return text_shards(folder.data_dir, folder.name, config.seqio_dataset.split or split_default)


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
