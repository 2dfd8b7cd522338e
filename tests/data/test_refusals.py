"""Errors and warnings of streams: old positions, values that are not text, missing targets."""

import datetime
import decimal
import io
import itertools

import datasets
import numpy as np
import pytest

from ll3m.data.config import DatasetConfig, JsonDatasetConfig, SeqioDatasetConfig
from tests.data.opening import open_dataset

CUT = SeqioDatasetConfig(batch_size=2, num_shards=2, task_feature_lengths=(16,))


def json_config(path):
  return DatasetConfig(type="json", seqio_dataset=CUT, json_dataset=JsonDatasetConfig(str(path)))


def replaced(state, content):
  """Returns the saved position with other bytes in place of each shard's documents."""
  changed = {}
  for name, data in state.items():
    with np.load(io.BytesIO(data)) as arrays:
      fields = dict(arrays) | {"documents": np.frombuffer(content, np.uint8)}
    buffer = io.BytesIO()
    np.savez(buffer, **fields)
    changed[name] = buffer.getvalue()
  return changed


@pytest.mark.parametrize(
  ("content", "found"),
  [
    (b"\x08\x15\x12\x04\x12\x02\x08\x02\xff", "the format of earlier versions, .* TensorFlow"),
    (b'{"format": 2}', "format 2"),
  ],
)
def test_a_position_of_another_format_is_refused(write_jsonl, tokenizer, content, found):
  path = write_jsonl(*({"text": f"row {i}"} for i in range(20)))
  stream = open_dataset(json_config(path), tokenizer, rows=range(2))
  next(stream)
  old = replaced(stream.state(), content)
  with pytest.raises(ValueError, match=f"{path} has {found}.*expected format 1.*load_checkpoint"):
    stream.set_state(old)


@pytest.mark.parametrize(
  "value",
  [datetime.datetime(2026, 1, 2), decimal.Decimal("1.50"), b"bytes", ["text"], {"a": "text"}],
  ids=lambda value: type(value).__name__,
)
def test_other_values_are_not_converted_to_text(tmp_path, tokenizer, value):
  path = tmp_path / "rows.parquet"
  datasets.Dataset.from_dict({"text": [value, value]}).to_parquet(path)
  with pytest.raises(ValueError, match=r"no usable row: .*field 'text' is .*\(2\)"):
    open_dataset(json_config(path), tokenizer, rows=range(2))


OWN_TASK = """
import seqio, tensorflow as tf
from ll3m.data import seqio_sources
from ll3m.data.seqio_vocabulary import RUN_VOCABULARY

def tokenize(trained):
  def preprocess(dataset, output_features):
    def cut(example):
      ids = RUN_VOCABULARY.encode_tf(example["text"])
      return {"targets": ids, "targets_loss": tf.ones_like(ids) * trained}
    return dataset.map(cut)
  return preprocess

feature = seqio.Feature(RUN_VOCABULARY, add_eos=False)
for name, trained in (("untrained_for_test", 0), ("trained_for_test", 1)):
  seqio.TaskRegistry.add(
    name,
    source=seqio_sources.IndexedSource(lambda split: ["if x: return"] * 4),
    preprocessors=[tokenize(trained)],
    output_features={"targets": feature, "targets_loss": feature},
    shuffle_buffer_size=None,
  )
"""


def test_a_stream_without_a_target_causes_one_warning(tmp_path, tokenizer, monkeypatch, caplog):
  (tmp_path / "untrained_tasks_for_test.py").write_text(OWN_TASK)
  monkeypatch.syspath_prepend(tmp_path)
  for name, reported in (("trained_for_test", 0), ("untrained_for_test", 1)):
    options = SeqioDatasetConfig(
      name, "untrained_tasks_for_test", batch_size=2, num_shards=2, task_feature_lengths=(16,)
    )
    caplog.clear()
    stream = open_dataset(DatasetConfig(seqio_dataset=options), tokenizer, rows=range(2))
    batches = list(itertools.islice(stream, 3))
    assert any(batch.mask.any() for batch in batches) == (not reported)
    warnings = [r.getMessage() for r in caplog.records if "token to train on" in r.getMessage()]
    assert len(warnings) == reported
    assert all(text.startswith(f"{name}: none of the first ") for text in warnings)


def test_a_dataset_without_assistant_turns_is_an_error(write_jsonl, tokenizer):
  messages = [{"role": "user", "content": "Hello"}]
  path = write_jsonl(*({"messages": messages} for _ in range(4)))
  with pytest.raises(ValueError, match="no usable row: .*no assistant turn"):
    open_dataset(json_config(path), tokenizer, rows=range(2))
