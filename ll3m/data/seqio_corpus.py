"""Documents of a seqio mixture or task, read by tf.data, with a position that can be saved."""

import dataclasses
import re
from collections.abc import Sequence
from typing import override

import seqio
import tensorflow as tf

from ll3m.data import run_context, seqio_tasks
from ll3m.data.corpus import Corpus, DocumentIterator
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.packing import Document
from ll3m.data.seqio_sources import TextShardSource, find_damaged
from ll3m.data.seqio_tasks import LOSS_SUFFIX
from ll3m.data.seqio_vocabulary import map_graph
from ll3m.data.skipped_examples import Skipped
from ll3m.data.tokenizer import Tokenizer

# Every shard has a pipeline of its own; a few threads each are plenty.
_THREADS = 2


class SeqioCorpus(Corpus):
  """A seqio task or mixture, to be read in shards."""

  def __init__(self, provider: seqio.Task | seqio.Mixture, spec: DataSpec, tokenizer: Tokenizer):
    """Binds a provider to a run; nothing is read yet.

    Raises:
      ValueError: if the provider lacks a feature.
    """
    options = spec.config.seqio_dataset
    files = {(source, spec.split): files for source, files in spec.files.items()}
    self._provider, self._fields = provider, options.task_feature_field
    self._context = run_context.RunContext(tokenizer, spec.data_dir, files=files)
    self._arguments = {"split": spec.split, "shuffle": spec.shuffle, "seed": spec.seed}
    self._repeat = spec.repeat
    self.num_shards, self.num_examples = options.num_shards, None
    self.skipped = Skipped()
    self.label = provider.name
    missing = [name for name in self._fields if name not in provider.output_features]
    if missing:
      known = ", ".join(provider.output_features)
      raise ValueError(f"{self.label} has the features {known}, not {', '.join(missing)}")

  @override
  def open_shard(self, shard: int) -> "SeqioDocuments":
    with run_context.use(dataclasses.replace(self._context, shard=shard)):
      dataset = self._provider.get_dataset(
        sequence_length=None,
        shard_info=seqio.ShardInfo(shard, self.num_shards),
        num_epochs=None if self._repeat else 1,
        trim_output_features=False,
        **self._arguments,
      )
      dataset = map_graph(dataset, self._join)
    options = tf.data.Options()
    options.threading.private_threadpool_size = _THREADS
    options.threading.max_intra_op_parallelism = 1
    # An autotuner sleeps longer and longer between its rounds, and closing the pipeline waits for
    # it to wake: at the end of a run for up to a minute.
    options.autotune.enabled = False
    return SeqioDocuments(dataset.with_options(options), self.label, self._files(shard))

  def _files(self, shard: int) -> list[str]:
    """The text shards that a shard of the stream reads."""
    provider = self._provider
    with run_context.use(self._context):
      return [
        file
        for task in (provider.tasks if isinstance(provider, seqio.Mixture) else [provider])
        if isinstance(task.source, TextShardSource)
        for file in task.source.files(self._arguments["split"], shard, self.num_shards)
      ]

  def _join(self, features: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Concatenates the chosen features; all but the last one carry no loss."""
    tokens = [tf.cast(features[name], tf.int32) for name in self._fields]
    loss = [tf.zeros_like(part) for part in tokens[:-1]]
    last = features.get(self._fields[-1] + LOSS_SUFFIX)
    loss.append(tf.ones_like(tokens[-1]) if last is None else tf.cast(last, tf.int32))
    return tf.concat(tokens, 0), tf.concat(loss, 0)


class SeqioDocuments(DocumentIterator):
  """What a tf.data pipeline of (tokens, loss) yields."""

  def __init__(self, dataset: tf.data.Dataset, label: str, files: Sequence[str]):
    self._iterator = iter(dataset)
    self._label, self._files = label, files

  def __next__(self) -> Document:
    try:
      tokens, loss = next(self._iterator)
    except tf.errors.OpError as error:
      # Other kinds are not of damage, and reading all files for them may take hours.
      of_damage = isinstance(error, tf.errors.DataLossError | tf.errors.InvalidArgumentError)
      damaged = find_damaged(self._files) if of_damage and self._files else None
      raise ValueError(f"reading {damaged or self._label} failed: {_sentence(error)}") from error
    return Document(tokens.numpy(), loss.numpy())

  @override
  def state(self) -> bytes:
    # Policy 2 (FAIL): an operation whose state would be lost is an error, not a silent gap.
    parts = tf.raw_ops.SerializeIterator(
      resource_handle=self._iterator._iterator_resource, external_state_policy=2
    )
    return tf.io.serialize_tensor(parts).numpy()

  @override
  def set_state(self, state: bytes) -> None:
    try:
      tf.raw_ops.DeserializeIterator(
        resource_handle=self._iterator._iterator_resource,
        serialized=tf.io.parse_tensor(state, tf.variant),
      )
    except tf.errors.OpError as error:
      raise ValueError(
        f"the saved data position does not fit {self._label} as it is now: {_sentence(error)}"
      ) from error


# What TensorFlow puts around an error's own words: the operation, the iterator, the kind.
_AROUND = re.compile(
  r"^({{.*?}} )?(Error in user-defined function .*? with iterator: \S+: )?(ValueError: )?"
  r"|(' failed with .*| \[Op:\w+\] name:.*)$"
)


def _sentence(error: tf.errors.OpError) -> str:
  """Returns the first line of what TensorFlow says, without the operation it says it of."""
  return _AROUND.sub("", str(error.message).strip().splitlines()[0])


def open_corpus(spec: DataSpec, tokenizer: Tokenizer) -> SeqioCorpus:
  """Finds the mixture or task that `spec` names and binds it to the run.

  Raises:
    ValueError: for an unknown mixture, split or feature.
  """
  options = spec.config.seqio_dataset
  provider = seqio_tasks.find(options.mixture_or_task_name, options.module)
  if spec.split not in provider.splits:
    raise ValueError(
      f"{provider.name} has the splits {', '.join(sorted(provider.splits))}, got {spec.split!r}"
    )
  return SeqioCorpus(provider, spec, tokenizer)
