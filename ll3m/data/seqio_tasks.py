"""The seqio tasks and mixtures that come with the library; importing this module registers them.

A task is a source of documents and the steps that convert them to `targets`. To add your own task,
copy the last lines of this file into a module and name the module with
`--train_dataset.seqio_dataset.module` (see docs/dataset.md).
"""

import importlib
import math
from collections.abc import Callable, Sequence

import seqio
import tensorflow as tf

from ll3m.core.model_config import did_you_mean
from ll3m.data import mixtures, run_context, seqio_sources
from ll3m.data.seqio_vocabulary import RUN_VOCABULARY, map_graph

# Size of the shuffle buffer per source and shard, in documents, unless the source shuffles by
# itself. It is small because tokenised books are large and buffers are saved with every checkpoint.
SHUFFLE_BUFFER = 128
# Beside a feature `x`, a task may have `x_loss`, which is 0 for tokens that are not trained.
LOSS_SUFFIX = "_loss"


def tokenize_documents(
  dataset: tf.data.Dataset, output_features: dict[str, seqio.Feature]
) -> tf.data.Dataset:
  """Maps {"text"} to {"targets"}: BOS (if the tokenizer has one), the text's tokens, EOS."""
  vocabulary = output_features["targets"].vocabulary
  head = [] if vocabulary.bos_id is None else [vocabulary.bos_id]
  tail = [vocabulary.eos_id]

  def tokenize(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    ids = vocabulary.encode_tf(example["text"])
    return {"targets": tf.concat([tf.constant(head, tf.int32), ids, tail], axis=0)}

  return map_graph(dataset, tokenize, parallel=True)


def prepend_bos(
  dataset: tf.data.Dataset, output_features: dict[str, seqio.Feature]
) -> tf.data.Dataset:
  """Prepends BOS (if the tokenizer has one) to the first of a task's features.

  `seqio.preprocessors` has steps that tokenize and append EOS, but none that adds BOS.
  """
  first = next(iter(output_features))
  bos_id = output_features[first].vocabulary.bos_id
  if bos_id is None:
    return dataset

  def prepend(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    heads = {first: bos_id, first + LOSS_SUFFIX: 0}
    longer = {
      name: tf.concat([tf.constant([head], example[name].dtype), example[name]], axis=0)
      for name, head in heads.items()
      if name in example
    }
    return example | longer

  return map_graph(dataset, prepend, parallel=True)


def add_text_task(name: str, source: seqio.DataSource) -> None:
  """Registers a task that trains on every token of the source's `text`."""
  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[tokenize_documents],
    output_features={"targets": seqio.Feature(vocabulary=RUN_VOCABULARY)},
    shuffle_buffer_size=None if source.performs_internal_shuffling else SHUFFLE_BUFFER,
  )


def ensure_shard_task(name: str) -> None:
  """Registers a task for a folder of text shards, unless there is one of this name."""
  if name not in seqio.TaskRegistry.names():
    add_text_task(name, seqio_sources.TextShardSource(name))


def add_mixture(name: str, rates: Sequence[tuple[str, float | int]]) -> None:
  """Registers a mixture that draws from its tasks in proportion to their rates.

  Raises:
    ValueError: A rate is not a positive number.
  """
  for task, rate in rates:
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
      raise ValueError(
        f"mixture {name!r}: the rate of {task!r} must be a positive number, got {rate!r}"
      )
  seqio.MixtureRegistry.add(name, list(rates), default_rate=1.0, sample_fn=_sample)


def _sample(
  datasets: Sequence[tf.data.Dataset], rates: Sequence[float], seed: int | None
) -> tf.data.Dataset:
  """Samples from the datasets until all have ended, in a different order in each shard."""
  shard = run_context.current().shard
  return tf.data.Dataset.sample_from_datasets(
    datasets, rates, seed=(seed or 0) * 1009 + shard, stop_on_empty_dataset=False
  )


def find(name: str, module: str | None = None) -> seqio.Task | seqio.Mixture:
  """Returns a registered task or mixture.

  Args:
    name: Name of the task or mixture.
    module: Python module to import first, which registers more tasks and mixtures.

  Raises:
    ValueError: The module cannot be imported or the name is unknown.
  """
  if module:
    try:
      importlib.import_module(module)
    except Exception as error:  # a user's module can raise any exception
      raise ValueError(
        f"seqio_dataset.module {module!r} cannot be imported: {type(error).__name__}: {error}"
      ) from error
  known = {*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()}
  if name not in known:
    raise ValueError(f"unknown mixture or task {name!r}{did_you_mean(name, known)}")
  return seqio.get_mixture_or_task(name)


_PYTHON: dict[str, Callable[[str], list[str]]] = {
  "python_reference": seqio_sources.python_reference,
  "package_descriptions": seqio_sources.package_descriptions,
}

for _name in mixtures.TEXT_SOURCES:
  add_text_task(_name, seqio_sources.TextShardSource(_name))
for _name in mixtures.PYTHON_SOURCES:
  add_text_task(_name, seqio_sources.IndexedSource(_PYTHON[_name]))
for _name, _rates in mixtures.MIXTURES.items():
  add_mixture(_name, _rates)
