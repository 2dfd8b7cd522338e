"""The number of listings that opening a data set requests from a store."""

import pytest

from ll3m.data.mixtures import sources_of
from tests.data.opening import open_dataset


@pytest.fixture
def in_store(gcs, tmp_path, monkeypatch):
  """A folder on the server with two shards of each source of dolma, accessible to this process."""
  import tensorflow as tf

  for name, value in gcs.environment(tmp_path).items():
    monkeypatch.setenv(name, value)
  file = tmp_path / "shard.tfrecord"
  with tf.io.TFRecordWriter(str(file)) as writer:
    for number in range(40):
      feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"some text %d" % number]))
      features = tf.train.Features(feature={"text": feature})
      writer.write(tf.train.Example(features=features).SerializeToString())
  for source in sources_of("dolma_mixture"):
    for number in range(2):
      name = f"listed/{source}/train-{number:05d}-of-00002.tfrecord"
      gcs.store.put("bucket", name, file.read_bytes(), {})
  return "gs://bucket/listed"


def test_opening_a_mixture_lists_each_source_at_most_twice(gcs, in_store, byte_tokenizer):
  from ll3m.data.config import DatasetConfig, SeqioDatasetConfig, TokenizerConfig
  from ll3m.data.tokenizer import load_tokenizer

  options = SeqioDatasetConfig(
    "dolma_mixture", batch_size=2, num_shards=2, task_feature_lengths=(32,)
  )
  tokenizer = load_tokenizer(TokenizerConfig(path=str(byte_tokenizer)))
  before = len(gcs.requests)
  stream = open_dataset(
    DatasetConfig(seqio_dataset=options), tokenizer, rows=range(2), data_dir=in_store
  )
  assert next(stream).mask.any()
  lists = [r for r in gcs.requests[before:] if r.partition("?")[0].endswith("/o")]
  for source in sources_of("dolma_mixture"):
    asked = [request for request in lists if f"listed%2F{source}" in request]
    assert 1 <= len(asked) <= 2, asked
  assert len(lists) <= 2 * len(sources_of("dolma_mixture")), lists
