"""The run's tokenizer as a seqio vocabulary."""

from collections.abc import Callable, Iterable
from typing import Any, SupportsInt, override

import numpy as np
import seqio
import tensorflow as tf

from ll3m.data import run_context

# TensorFlow only prepares text; accelerators and their memory are left to JAX.
tf.config.set_visible_devices([], "GPU")


def python_op(function: Callable[..., Any], inputs: list[tf.Tensor], dtypes: Any) -> Any:
  """Calls Python inside a tf.data pipeline whose position can still be saved.

  `stateful=False` lets tf.data save the iterator; with a stateful operation, saving fails. In
  return, `function` must give the same output for the same inputs.
  """
  return tf.numpy_function(function, inputs, dtypes, stateful=False)


def map_graph(
  dataset: tf.data.Dataset, function: Callable[..., Any], *, parallel: bool = False
) -> tf.data.Dataset:
  """Maps a function of TensorFlow operations, which AutoGraph does not need to convert."""
  return dataset.map(
    tf.autograph.experimental.do_not_convert(function),
    num_parallel_calls=tf.data.AUTOTUNE if parallel else None,
  )


class RunVocabulary(seqio.Vocabulary):
  """Vocabulary of the run that builds the pipeline: its tokenizer (see `run_context`)."""

  @property
  @override
  def bos_id(self) -> int | None:
    return run_context.current().tokenizer.bos_id

  @property
  @override
  def eos_id(self) -> int:
    return run_context.current().tokenizer.eos_id

  @property
  @override
  def unk_id(self) -> None:
    return None

  @property
  def _base_vocab_size(self) -> int:
    return run_context.current().tokenizer.vocab_size

  def _encode(self, s: str) -> list[int]:
    return run_context.current().tokenizer.encode(s)

  def _decode(self, ids: Iterable[SupportsInt]) -> str:
    return run_context.current().tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    tokenizer = run_context.current().tokenizer  # looked up now and kept by the pipeline

    def encode(text: bytes) -> np.ndarray:
      return np.array(tokenizer.encode(text.decode("utf-8", errors="replace")), np.int32)

    ids = python_op(encode, [s], tf.int32)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    tokenizer = run_context.current().tokenizer
    text = python_op(lambda array: tokenizer.decode(array).encode(), [ids], tf.string)
    text.set_shape([])
    return text


RUN_VOCABULARY = RunVocabulary()
