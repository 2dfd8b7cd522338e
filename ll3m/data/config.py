"""The options of a dataset and of a tokenizer, and what can be checked of them early.

No TensorFlow here: commands validate a run with these before anything slow is imported.
"""

import dataclasses
import re

from ll3m.core import options

TOKENIZER_NAMES = ("llama", "mistral", "gemma", "phi")

_MOST_LISTED = 2**20  # rows and shards are lists in memory


@dataclasses.dataclass(frozen=True)
class SeqioDatasetConfig:
  """What is read with `type=seqio`, and how the stream is cut, whatever its type."""

  mixture_or_task_name: str | None = options.option(
    None, "Which seqio mixture or task to read (type=seqio); docs/dataset.md lists them."
  )
  module: str | None = options.option(
    None, "Python module to import first; it registers seqio tasks and mixtures of your own."
  )
  split: str | None = options.option(
    None, "Split of the mixture or task; default: train to train on, validation to evaluate on."
  )
  batch_size: int = options.option(
    8, "Sequences per micro-step over all devices; holds for every dataset type."
  )
  task_feature_field: tuple[str, ...] = options.option(
    ("targets",),
    "Features of the task that make up a document, in this order; the last one is trained on.",
  )
  task_feature_lengths: tuple[int, ...] = options.option(
    (1024,),
    "Tokens per feature; a row is as long as their sum. Holds for every dataset type.",
  )
  shuffle: bool | None = options.option(
    None, "Shuffle the documents (every dataset type); default: to train yes, to evaluate no."
  )
  pack: bool = options.option(
    True,
    "Fill rows with consecutive documents (every dataset type); False starts each document on "
    "a row of its own.",
  )
  num_shards: int = options.option(
    8,
    "Independent pipelines that the stream is split into (every dataset type). It fixes the "
    "order of the data, whatever the number of processes; must not change within a run.",
  )

  def __post_init__(self):
    for name in ("batch_size", "num_shards"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
      if getattr(self, name) > _MOST_LISTED:
        raise ValueError(f"`{name}` must be at most {_MOST_LISTED}, got {getattr(self, name)}")
    fields, lengths = self.task_feature_field, self.task_feature_lengths
    if not fields or len(fields) != len(lengths):
      raise ValueError(
        "`task_feature_lengths` must give one length for each of "
        f"`task_feature_field`: {fields}, got {lengths}"
      )
    if min(lengths) < 1 or sum(lengths) < 2:
      raise ValueError(
        f"`task_feature_lengths` must be positive and make up at least 2 tokens, got {lengths}"
      )

  @property
  def length(self) -> int:
    """T, tokens of a row."""
    return sum(self.task_feature_lengths)


@dataclasses.dataclass(frozen=True)
class JsonDatasetConfig:
  """Files of rows (type=json)."""

  path: str | None = options.option(
    None,
    "File or glob of JSON Lines, JSON arrays, CSV, TSV or parquet, plain, .gz or .zst (type=json).",
  )


@dataclasses.dataclass(frozen=True)
class HuggingFaceDatasetConfig:
  """A dataset that the `datasets` library can load (type=huggingface)."""

  path: str | None = options.option(
    None, "Dataset repository or local folder, as datasets.load_dataset takes it."
  )
  name: str | None = options.option(None, "Configuration of the dataset.")
  split: str | None = options.option(
    None,
    "Split of the dataset, e.g. train[:1%]; default: train to train on, validation to evaluate on.",
  )
  streaming: bool = options.option(
    False, "Read over the network while training instead of downloading first."
  )


@dataclasses.dataclass(frozen=True)
class TextProcessorConfig:
  """How an example of a json or huggingface dataset becomes a document."""

  fields: str = options.option(
    "",
    "Fields that make up a document: commas separate fields, + joins subfields, brackets mean "
    "no loss, e.g. '[system+prompt],answer'; 'messages' applies the tokenizer's chat template "
    "with loss on assistant turns. Default: messages where an example has them, else text.",
  )
  subfield_separator: str = options.option(" ", "What stands between subfields that + joins.")

  def __post_init__(self):
    parse_fields(self.fields)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """A stream of batches: where the text comes from and how it is cut."""

  type: str = options.option(
    "seqio", "Where the text comes from.", choices=("seqio", "json", "huggingface")
  )
  seqio_dataset: SeqioDatasetConfig = options.group(SeqioDatasetConfig)
  json_dataset: JsonDatasetConfig = options.group(JsonDatasetConfig)
  huggingface_dataset: HuggingFaceDatasetConfig = options.group(HuggingFaceDatasetConfig)
  text_processor: TextProcessorConfig = options.group(TextProcessorConfig)

  def without_effect(self) -> dict[str, str]:
    """Returns the options that a dataset of this type does not read, and why, by their names."""
    return {
      name: f"with `type`={self.type}" for name, types in _READ_BY.items() if self.type not in types
    }


@dataclasses.dataclass(frozen=True)
class StrictConfig:
  """The option of every command that reads examples."""

  strict: bool = options.option(
    False,
    "Stop at the first example that cannot be used, naming its file, line and what is wrong with "
    "it, instead of leaving it out (type=json and type=huggingface).",
  )


# Options of a dataset that only some types read, and these types.
_READ_BY = {
  "json_dataset": ("json",),
  "huggingface_dataset": ("huggingface",),
  "text_processor": ("json", "huggingface"),
  "seqio_dataset.mixture_or_task_name": ("seqio",),
  "seqio_dataset.module": ("seqio",),
  "seqio_dataset.split": ("seqio",),
  "seqio_dataset.task_feature_field": ("seqio",),
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which tokenizer a run uses."""

  type: str | None = options.option(
    None,
    f"One of {', '.join(TOKENIZER_NAMES)} (found in the checkpoint, or at tokenizer.path), or "
    "a path itself. Default: the tokenizer that travels with the checkpoint.",
  )
  path: str | None = options.option(
    None, "SentencePiece file or Hugging Face tokenizer folder, instead of the checkpoint's."
  )
  extra_tokens: tuple[str, ...] = options.option(
    (), "Token to append to the vocabulary; may be repeated.", repeated=True
  )

  @property
  def other_path(self) -> str | None:
    """The path of another tokenizer than the one that travels with the checkpoint, or None."""
    return self.path or (None if self.type in TOKENIZER_NAMES else self.type)

  @property
  def is_checkpoints_own(self) -> bool:
    """Whether the tokenizer is just the one that travels with the checkpoint."""
    return self.other_path is None and not self.extra_tokens


@dataclasses.dataclass(frozen=True)
class GinConfig:
  """Settings in gin's language."""

  gin_bindings: tuple[str, ...] = options.option(
    (),
    'gin binding, e.g. data.data_utils.get_default_vocabulary.tokenizer_type="llama"; several '
    "are separated by newlines or commas, or the flag is repeated.",
    repeated=True,
  )
  gin_config: tuple[str, ...] = options.option(
    (), "gin file to read before the bindings; may be repeated.", repeated=True
  )


@dataclasses.dataclass(frozen=True)
class TextField:
  """One field of a document: subfields that are joined, trained on or not."""

  names: tuple[str, ...]
  loss: bool


def parse_fields(spec: str) -> tuple[TextField, ...]:
  """Parses '[system+prompt],answer' into fields; brackets may enclose several.

  Raises:
    ValueError: if the brackets do not match or a name is missing.
  """
  fields, inside = [], False
  for item in spec.split(",") if spec.strip() else ():
    text = item.strip()
    opens, closes = text.startswith("["), text.endswith("]")
    names = tuple(name.strip() for name in text[opens : len(text) - closes].split("+"))
    if (
      opens
      and inside
      or closes
      and not (inside or opens)
      or not all(names)
      or any(re.search(r"[\[\]]", name) for name in names)
    ):
      raise ValueError(
        "`fields` expects field names separated by commas, some in brackets, "
        f"e.g. '[prompt],answer', got {spec!r}"
      )
    inside = inside or opens
    fields.append(TextField(names, loss=not inside))
    inside = inside and not closes
  if inside:
    raise ValueError(f"`fields` has a bracket that is not closed: {spec!r}")
  if fields and not any(field.loss for field in fields):
    raise ValueError(f"`fields` has no field to learn from outside brackets: {spec!r}")
  return tuple(fields)
