"""Options of datasets and tokenizers, with the checks that need no data.

This module does not import TensorFlow, so that commands can check their options before slow
imports.
"""

import dataclasses
import re

from ll3m.core import options

# The names of the families, whose checkpoints have a tokenizer.
TOKENIZER_NAMES = (
  "llama", "mistral", "gemma", "phi", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3",
  "olmo2",
)  # fmt: skip
# Shapes of rows, in the order in which they are tried; `shapes.py` describes them.
ROW_SHAPES = (
  "messages", "conversations", "chosen", "prompt_completion", "instruction", "dolly", "text"
)  # fmt: skip
OVERFLOWS = ("split", "truncate", "keep_end", "drop")
PLAIN_TEXT = ("file", "paragraph", "line")

DEFAULT_SEED = 42  # of the order of the data
_MOST_LISTED = 2**20  # rows and shards are lists in memory


@dataclasses.dataclass(frozen=True)
class SeqioDatasetConfig:
  """Source of `type=seqio`, and the division of streams of every type into rows and batches."""

  mixture_or_task_name: str | None = options.option(
    None, "Name of the seqio mixture or task to read (type=seqio); docs/dataset.md lists them."
  )
  module: str | None = options.option(
    None, "Python module to import first, which registers your own seqio tasks and mixtures."
  )
  split: str | None = options.option(
    None, "Split of the mixture or task. Default: train for training, validation for evaluation."
  )
  batch_size: int = options.option(
    8, "Number of sequences per micro-step over all devices (every dataset type)."
  )
  task_feature_field: tuple[str, ...] = options.option(
    ("targets",),
    "Features of the task that form a document, in this order; only the last one is trained on.",
  )
  task_feature_lengths: tuple[int, ...] = options.option(
    (1024,),
    "Number of tokens per feature; their sum is the length of a row (every dataset type).",
  )
  shuffle: bool | None = options.option(
    None,
    "Shuffle the documents (every dataset type). Default: only for training.",
  )
  pack: bool = options.option(
    True,
    "Fill rows with consecutive documents (every dataset type); False starts a new row for each "
    "document.",
  )
  num_shards: int | None = options.option(
    None,
    "Number of independent pipelines into which the stream is split (every dataset type). It "
    "determines the order of the data, whatever the number of processes, and must not change "
    "within a run. Default: 1 for files and datasets that data names, which every process then "
    "reads as a whole; else 8.",
  )

  def __post_init__(self):
    for name in ("batch_size", "num_shards"):
      value = 1 if getattr(self, name) is None else getattr(self, name)
      if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")
      if value > _MOST_LISTED:
        raise ValueError(f"`{name}` must be at most {_MOST_LISTED}, got {value}")
    fields, lengths = self.task_feature_field, self.task_feature_lengths
    if not fields or len(fields) != len(lengths):
      raise ValueError(
        "`task_feature_lengths` must have one length for each feature of "
        f"`task_feature_field` {fields}, got {lengths}"
      )
    if min(lengths) < 1 or sum(lengths) < 2:
      what = "be at least 2" if len(lengths) == 1 else "be positive"
      given = lengths[0] if len(lengths) == 1 else lengths
      raise ValueError(f"`task_feature_lengths` must {what}, got {given}")

  @property
  def length(self) -> int:
    """T, the number of tokens in a row."""
    return sum(self.task_feature_lengths)


@dataclasses.dataclass(frozen=True)
class JsonDatasetConfig:
  """Files of rows (type=json)."""

  path: str | None = options.option(
    None,
    "File or glob (type=json): JSON Lines, JSON arrays, CSV, TSV or parquet, also as .gz or .zst.",
  )


@dataclasses.dataclass(frozen=True)
class HuggingFaceDatasetConfig:
  """A dataset that the `datasets` library can load (type=huggingface)."""

  path: str | None = options.option(
    None, "Dataset repository or local folder, as accepted by datasets.load_dataset."
  )
  name: str | None = options.option(None, "Configuration of the dataset.")
  split: str | None = options.option(
    None,
    "Split of the dataset, e.g. train[:1%]. Default: train for training, validation for "
    "evaluation.",
  )
  streaming: bool = options.option(
    False, "Read over the network while training instead of downloading first."
  )


@dataclasses.dataclass(frozen=True)
class TextProcessorConfig:
  """Fields of rows that form a document; an alternative to data_format."""

  fields: str = options.option(
    "",
    "Fields that form a document: commas separate fields, + joins subfields, brackets mean "
    "no loss, e.g. '[system+prompt],answer'. 'messages' applies the tokenizer's chat template, "
    "with loss on assistant turns. Default: see data_format.",
  )
  subfield_separator: str = options.option(" ", "Text between subfields that + joins.")

  def __post_init__(self):
    parse_fields(self.fields)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """A stream of batches: the source of the text and its division into rows and batches."""

  data: str | None = options.option(
    None,
    "What to read: files, globs or folders of JSON, CSV, TSV, parquet, Arrow or text, local or "
    "gs://; a folder of save_to_disk or of TFRecord shards; a Hugging Face dataset as NAME, "
    "NAME:SPLIT or NAME:CONFIGURATION:SPLIT; or mixture:NAME. Several are separated by commas, and "
    "may have weights: a.jsonl=0.7,b.parquet=0.3.",
  )
  data_format: str = options.option(
    "auto",
    "Shape of the rows; docs/dataset.md describes each. auto recognises it from the columns.",
    choices=("auto", *ROW_SHAPES),
  )
  prompt_template: str | None = options.option(
    None,
    "Text that is read but not trained on, with columns in braces, for rows of any columns: "
    "'Question: {question}\\nAnswer: '. Needs completion.",
  )
  completion: str | None = options.option(
    None, "Text that is trained on, with columns in braces: '{answer}'."
  )
  plain_text: str = options.option(
    "file", "Unit of a plain text file that becomes a document.", choices=PLAIN_TEXT
  )
  overflow: str | None = options.option(
    None,
    "What happens to a document that is longer than a row. split: it continues in the next row. "
    "truncate, keep_end: its end or its beginning is cut off. drop: it is skipped. Except with "
    "split, no document is divided. Default: truncate for prompts and conversations, split for "
    "plain text and text_processor.fields.",
    choices=OVERFLOWS,
  )
  type: str = options.option(
    "seqio", "Source of the text if data is not given.", choices=("seqio", "json", "huggingface")
  )
  seqio_dataset: SeqioDatasetConfig = options.group(SeqioDatasetConfig)
  json_dataset: JsonDatasetConfig = options.group(JsonDatasetConfig)
  huggingface_dataset: HuggingFaceDatasetConfig = options.group(HuggingFaceDatasetConfig)
  text_processor: TextProcessorConfig = options.group(TextProcessorConfig)

  def __post_init__(self):
    ways = {
      "data_format": self.data_format != "auto",
      "prompt_template": self.prompt_template is not None,
      "completion": self.completion is not None,
      "text_processor.fields": bool(self.text_processor.fields),
    }
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1 and given != ["prompt_template", "completion"]:
      raise ValueError(
        f"`{given[0]}` cannot be combined with `{given[1]}`: each says what the rows contain"
      )

  def without_effect(self) -> dict[str, str]:
    """Returns the options that a dataset of this type does not read, by name, with the reasons."""
    if self.data is not None:
      kind = "mixture" if self.data.startswith("mixture:") else "rows"
      unread = [name for name, kinds in _READ_BY.items() if kind not in kinds]
      return dict.fromkeys(unread, "with `data`" if kind == "rows" else f"with `data`={self.data}")
    return {
      name: f"with `type`={self.type}" for name, types in _READ_BY.items() if self.type not in types
    }


def short_names(prefix: str) -> dict[str, str]:
  """Returns the short names of a dataset's flags, with the flags' own names in a group."""
  return {short: f"{prefix}.{name}" for short, name in _SHORT.items()}


@dataclasses.dataclass(frozen=True)
class StrictConfig:
  """Option of all commands that read examples."""

  strict: bool = options.option(
    False,
    "Stop at the first unusable example, reporting its file, line and fault, instead of skipping "
    "it (type=json and type=huggingface).",
  )


_SHORT = {
  "data": "data",
  "data_format": "data_format",
  "prompt_template": "prompt_template",
  "completion": "completion",
  "plain_text": "plain_text",
  "batch_size": "seqio_dataset.batch_size",
  "max_length": "seqio_dataset.task_feature_lengths",
  "overflow": "overflow",
}
# Dataset options that only some types read, with those types. For `data`, the type is "mixture" or
# "rows".
_ROWS = ("json", "huggingface", "rows")
_READ_BY = {
  "type": ("seqio", "json", "huggingface"),
  "json_dataset": ("json",),
  "huggingface_dataset.path": ("huggingface",),
  "huggingface_dataset.name": ("huggingface",),
  "huggingface_dataset.split": ("huggingface",),
  "huggingface_dataset.streaming": ("huggingface", "rows"),
  "text_processor": _ROWS,
  "data_format": _ROWS,
  "prompt_template": _ROWS,
  "completion": _ROWS,
  "plain_text": _ROWS,
  "overflow": _ROWS,
  "seqio_dataset.mixture_or_task_name": ("seqio",),
  "seqio_dataset.module": ("seqio", "mixture"),
  "seqio_dataset.split": ("seqio", "mixture"),
  "seqio_dataset.task_feature_field": ("seqio", "mixture"),
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Options of a run's tokenizer."""

  type: str | None = options.option(
    None,
    f"One of {', '.join(TOKENIZER_NAMES)} (read from the checkpoint or from tokenizer.path), or "
    "the path of a tokenizer. Default: the checkpoint's own tokenizer.",
  )
  path: str | None = options.option(
    None,
    "SentencePiece file or Hugging Face tokenizer folder to use instead of the checkpoint's own "
    "tokenizer.",
  )
  extra_tokens: tuple[str, ...] = options.option(
    (), "Token to append to the vocabulary; may be repeated.", repeated=True
  )

  @property
  def other_path(self) -> str | None:
    """Path of a tokenizer other than the checkpoint's own, or None."""
    return self.path or (None if self.type in TOKENIZER_NAMES else self.type)

  @property
  def is_checkpoints_own(self) -> bool:
    """Whether the tokenizer is the checkpoint's own, without extra tokens."""
    return self.other_path is None and not self.extra_tokens


@dataclasses.dataclass(frozen=True)
class GinConfig:
  """Settings in gin syntax."""

  gin_bindings: tuple[str, ...] = options.option(
    (),
    'Gin bindings, e.g. data.data_utils.get_default_vocabulary.tokenizer_type="llama", separated '
    "by newlines or commas; may be repeated.",
    repeated=True,
  )
  gin_config: tuple[str, ...] = options.option(
    (), "Gin file to read before the bindings; may be repeated.", repeated=True
  )


@dataclasses.dataclass(frozen=True)
class TextField:
  """One field of a document: joined subfields, with or without loss."""

  names: tuple[str, ...]
  loss: bool


def parse_fields(spec: str) -> tuple[TextField, ...]:
  """Parses '[system+prompt],answer' into fields; brackets may enclose several.

  Raises:
    ValueError: The brackets do not match or a name is missing.
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
        "`fields` must be field names separated by commas, some in brackets, "
        f"e.g. '[prompt],answer', got {spec!r}"
      )
    inside = inside or opens
    fields.append(TextField(names, loss=not inside))
    inside = inside and not closes
  if inside:
    raise ValueError(f"`fields` has an unclosed bracket: {spec!r}")
  if fields and not any(field.loss for field in fields):
    raise ValueError(f"`fields` must have a field to train on, outside brackets, got {spec!r}")
  return tuple(fields)
