"""Documents of one shard of a stream, read by tf.data, with a position that can be saved."""

import collections

import numpy as np
import seqio
import tensorflow as tf

from ll3m.data import run_context, tasks
from ll3m.data.config import DatasetConfig
from ll3m.data.huggingface import HuggingFaceRows, load_huggingface
from ll3m.data.packing import Document
from ll3m.data.sources import IndexedSource, JsonLines, parse_json
from ll3m.data.text_processor import TextProcessor, Unusable
from ll3m.data.tokenizer import Tokenizer
from ll3m.data.vocabularies import RUN_VOCABULARY, python_op

# Beside a feature `x`, a task may give `x_loss`: 0 for tokens that are not trained.
LOSS_SUFFIX = "_loss"
# Every shard has a pipeline of its own; a few threads each are plenty.
_THREADS = 2


class Corpus:
  """A seqio task or mixture, to be read in shards.

  Attributes:
    num_shards: how many; fewer than asked for when there are fewer examples.
    skipped: how many examples were unusable, by reason.
    label: what to call it in messages.
  """

  def __init__(
    self,
    provider: seqio.Task | seqio.Mixture,
    config: DatasetConfig,
    context: run_context.RunContext,
    *,
    split: str,
    shuffle: bool,
    seed: int,
    repeat: bool,
    num_shards: int,
    skipped: collections.Counter[str],
  ):
    """Binds a provider to a run; nothing is read yet."""
    self._provider, self._context = provider, context
    self._fields = config.seqio_dataset.task_feature_field if config.type == "seqio" else (
      "targets",)  # fmt: skip
    self._arguments = {"split": split, "shuffle": shuffle, "seed": seed}
    self._repeat = repeat
    self.num_shards = num_shards
    self.skipped = skipped
    self.label = provider.name
    missing = [name for name in self._fields if name not in provider.output_features]
    if missing:
      known = ", ".join(provider.output_features)
      raise ValueError(f"{self.label} has the features {known}, not {', '.join(missing)}")

  def open_shard(self, shard: int) -> "Documents":
    """Builds the pipeline of one shard."""
    with run_context.use(run_context.RunContext(
      self._context.tokenizer, self._context.data_dir, shard)):  # fmt: skip
      dataset = self._provider.get_dataset(
        sequence_length=None,
        shard_info=seqio.ShardInfo(shard, self.num_shards),
        num_epochs=None if self._repeat else 1,
        trim_output_features=False,
        **self._arguments,
      )
      dataset = dataset.map(self._join)
    options = tf.data.Options()
    options.threading.private_threadpool_size = _THREADS
    options.threading.max_intra_op_parallelism = 1
    options.autotune.ram_budget = 1 << 26  # bytes, of prefetched documents
    return Documents(dataset.with_options(options), self.label, self.skipped)

  def _join(self, features: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Concatenates the chosen features; all but the last one carry no loss."""
    tokens = [tf.cast(features[name], tf.int32) for name in self._fields]
    loss = [tf.zeros_like(part) for part in tokens[:-1]]
    last = features.get(self._fields[-1] + LOSS_SUFFIX)
    loss.append(tf.ones_like(tokens[-1]) if last is None else tf.cast(last, tf.int32))
    return tf.concat(tokens, 0), tf.concat(loss, 0)


class Documents:
  """Iterator over `Document`s whose position is bytes."""

  def __init__(self, dataset: tf.data.Dataset, label: str, skipped: collections.Counter[str]):
    self._iterator = iter(dataset)
    self._label, self._skipped = label, skipped

  def __next__(self) -> Document:
    try:
      tokens, loss = next(self._iterator)
    except tf.errors.OpError as error:
      first = str(error.message).strip().splitlines()[0]
      raise ValueError(f"reading {self._label} failed: {first}") from error
    return Document(tokens.numpy(), loss.numpy())

  def __iter__(self) -> "Documents":
    return self

  def state(self) -> bytes:
    """Returns the position, with everything that tf.data has buffered."""
    # Policy 2 (FAIL): an operation whose state would be lost is an error, not a silent gap.
    parts = tf.raw_ops.SerializeIterator(
      resource_handle=self._iterator._iterator_resource, external_state_policy=2
    )
    return tf.io.serialize_tensor(parts).numpy()

  def set_state(self, state: bytes) -> None:
    """Moves to a position that `state()` gave.

    Raises:
      ValueError: if the position does not fit this pipeline.
    """
    try:
      tf.raw_ops.DeserializeIterator(
        resource_handle=self._iterator._iterator_resource,
        serialized=tf.io.parse_tensor(state, tf.variant),
      )
    except tf.errors.OpError as error:
      first = str(error.message).strip().splitlines()[0]
      raise ValueError(
        f"the saved data position does not fit {self._label} as it is now: {first}"
      ) from error


def open_corpus(
  config: DatasetConfig,
  tokenizer: Tokenizer,
  *,
  data_dir: str | None,
  seed: int,
  split_default: str,
  repeat: bool,
) -> Corpus:
  """Finds what `config` names and binds it to the run.

  Raises:
    ValueError: for an unknown mixture, split or feature, or a file without a usable line.
  """
  options = config.seqio_dataset
  split = options.split or split_default
  num_shards, skipped = options.num_shards, collections.Counter()
  if config.type == "seqio":
    provider = tasks.find(options.mixture_or_task_name, options.module)
    if split not in provider.splits:
      raise ValueError(
        f"{provider.name} has the splits {', '.join(sorted(provider.splits))}, got {split!r}"
      )
  else:
    processor = TextProcessor(config.text_processor, tokenizer)
    if config.type == "json":
      examples = JsonLines(config.json_dataset.path, processor)
      skipped = examples.skipped
    else:
      examples = HuggingFaceRows(load_huggingface(config.huggingface_dataset))
    if not len(examples):
      raise ValueError(f"{config.huggingface_dataset.path} has no examples")
    provider = _example_task(config, examples, processor, skipped)
    split = "train"  # the only one that this task has
    num_shards = min(num_shards, len(examples))
  return Corpus(
    provider,
    config,
    run_context.RunContext(tokenizer, data_dir),
    split=split,
    shuffle=repeat if options.shuffle is None else options.shuffle,
    seed=seed,
    repeat=repeat,
    num_shards=num_shards,
    skipped=skipped,
  )


def _example_task(
  config: DatasetConfig,
  examples: JsonLines | HuggingFaceRows,
  processor: TextProcessor,
  skipped: collections.Counter[str],
) -> seqio.Task:
  """Makes a seqio task of numbered JSON objects; it is not registered."""

  def process(line: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
      return tuple(processor(parse_json(line)))
    except Unusable as error:  # counted here, left out where documents become rows
      skipped[str(error)] += 1
      return np.zeros(0, np.int32), np.zeros(0, np.int32)

  def preprocess(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def to_features(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
      tokens, loss = python_op(process, [example["example"]], (tf.int32, tf.int32))
      return {"targets": tf.ensure_shape(tokens, [None]),
              "targets" + LOSS_SUFFIX: tf.ensure_shape(loss, [None])}  # fmt: skip

    return dataset.map(to_features, num_parallel_calls=tf.data.AUTOTUNE)

  feature = seqio.Feature(vocabulary=RUN_VOCABULARY, add_eos=False)
  path = config.json_dataset.path if config.type == "json" else config.huggingface_dataset.path
  return seqio.Task(
    "".join(c if c.isalnum() else "_" for c in f"{config.type}_{path}"),  # seqio allows only \w
    source=IndexedSource(lambda _: examples, splits=("train",), feature="example"),
    preprocessors=[preprocess],
    output_features={"targets": feature, "targets" + LOSS_SUFFIX: feature},
    shuffle_buffer_size=None,  # the source shuffles by itself
  )
