"""Documents of a seqio mixture or task, read by tf.data, with a position that can be saved."""

import dataclasses
import re
from collections.abc import Sequence
from typing import override

import seqio
import tensorflow as tf

from ll3m.data import mixtures, run_context, seqio_tasks
from ll3m.data.corpus import Corpus, DocumentIterator
from ll3m.data.dataset_spec import DataSpec
from ll3m.data.packing import Document
from ll3m.data.seqio_sources import TextShardSource, find_damaged
from ll3m.data.seqio_tasks import LOSS_SUFFIX
from ll3m.data.seqio_vocabulary import map_graph
from ll3m.data.skipped_examples import Skipped
from ll3m.data.tokenizer import Tokenizer

# Threads per shard; each shard has its own pipeline, so a few are enough.
_THREADS = 2


class SeqioCorpus(Corpus):
  """A seqio task or mixture, read in shards."""

  def __init__(self, provider: seqio.Task | seqio.Mixture, spec: DataSpec, tokenizer: Tokenizer):
    """Binds a provider to a run; nothing is read yet.

    Raises:
      ValueError: The provider lacks a feature.
    """
    options = spec.config.seqio_dataset
    files = {(source, spec.split): files for source, files in spec.files.items()}
    self._provider, self._fields = provider, options.task_feature_field
    self._context = run_context.RunContext(tokenizer, spec.data_dir, files=files)
    self._arguments = {"split": spec.split, "shuffle": spec.shuffle, "seed": spec.seed}
    self._passes = spec.passes
    self.num_shards, self.num_examples = options.num_shards, None
    self.skipped, self.overflow = Skipped(), "split"
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
        num_epochs=self._passes,
        trim_output_features=False,
        **self._arguments,
      )
      dataset = map_graph(dataset, self._join)
    options = tf.data.Options()
    options.threading.private_threadpool_size = _THREADS
    options.threading.max_intra_op_parallelism = 1
    # The autotuner sleeps longer after each round, and closing the pipeline waits until it wakes:
    # up to a minute at the end of a run.
    options.autotune.enabled = False
    return SeqioDocuments(dataset.with_options(options), self.label, self._files(shard))

  def _files(self, shard: int) -> list[str]:
    """Returns the text shards that a shard of the stream reads."""
    provider = self._provider
    with run_context.use(self._context):
      return [
        file
        for task in (provider.tasks if isinstance(provider, seqio.Mixture) else [provider])
        if isinstance(task.source, TextShardSource)
        for file in task.source.files(self._arguments["split"], shard, self.num_shards)
      ]

  def _join(self, features: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Concatenates the chosen features, of which only the last one has loss."""
    tokens = [tf.cast(features[name], tf.int32) for name in self._fields]
    loss = [tf.zeros_like(part) for part in tokens[:-1]]
    last = features.get(self._fields[-1] + LOSS_SUFFIX)
    loss.append(tf.ones_like(tokens[-1]) if last is None else tf.cast(last, tf.int32))
    return tf.concat(tokens, 0), tf.concat(loss, 0)


class SeqioDocuments(DocumentIterator):
  """Iterator over the documents of a tf.data pipeline of (tokens, loss)."""

  def __init__(self, dataset: tf.data.Dataset, label: str, files: Sequence[str]):
    self._iterator = iter(dataset)
    self._label, self._files = label, files

  def __next__(self) -> Document:
    try:
      tokens, loss = next(self._iterator)
    except tf.errors.OpError as error:
      # Other errors do not indicate damage, and reading all files to find it may take hours.
      of_damage = isinstance(error, tf.errors.DataLossError | tf.errors.InvalidArgumentError)
      damaged = find_damaged(self._files) if of_damage and self._files else None
      raise ValueError(f"reading {damaged or self._label} failed: {_sentence(error)}") from error
    return Document(tokens.numpy(), loss.numpy())

  @override
  def state(self) -> bytes:
    # Policy 2 (FAIL): an operation whose state cannot be saved raises an error.
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
        f"the saved data position does not match the current {self._label}: {_sentence(error)}"
      ) from error


# Text that TensorFlow adds to an error message: the operation, the iterator, the type of error.
_AROUND = re.compile(
  r"^({{.*?}} )?(Error in user-defined function .*? with iterator: \S+: )?(ValueError: )?"
  r"|(' failed with .*| \[Op:\w+\] name:.*)$"
)


def _sentence(error: tf.errors.OpError) -> str:
  """Returns the first line of a TensorFlow error, without the name of the operation."""
  return _AROUND.sub("", str(error.message).strip().splitlines()[0])


def open_corpus(spec: DataSpec, tokenizer: Tokenizer) -> SeqioCorpus:
  """Finds the mixture or task that `spec` names and binds it to the run.

  Raises:
    ValueError: The mixture, split or feature is unknown.
  """
  options = spec.config.seqio_dataset
  name = options.mixture_or_task_name
  if name in spec.files and name not in mixtures.known_names():  # a folder of shards
    seqio_tasks.ensure_shard_task(name)
  provider = seqio_tasks.find(name, options.module)
  if spec.split not in provider.splits:
    raise ValueError(
      f"{provider.name} has the splits {', '.join(sorted(provider.splits))}, got {spec.split!r}"
    )
  return SeqioCorpus(provider, spec, tokenizer)
