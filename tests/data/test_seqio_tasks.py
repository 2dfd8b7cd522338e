"""Mixtures of TFRecord shards, and users' own tasks."""

import copy
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import seqio

from ll3m.data import run_context, seqio_tasks
from ll3m.data.config import DatasetConfig, SeqioDatasetConfig, TokenizerConfig
from ll3m.data.seqio_vocabulary import RUN_VOCABULARY
from ll3m.data.tokenizer import load_tokenizer
from tests.data.opening import open_dataset


def write_shards(data_dir, source, split, documents, num_files):
  """Distributes texts to files in turn, like tools/prepare_text.py."""
  import tensorflow as tf

  (data_dir / source).mkdir(parents=True, exist_ok=True)
  for i in range(num_files):
    path = data_dir / source / f"{split}-{i:05d}-of-{num_files:05d}.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
      for number, text in list(enumerate(documents))[i::num_files]:
        values = {"id": f"{number}", "text": text}
        feature = {
          key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
          for key, value in values.items()
        }
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        writer.write(example.SerializeToString())


def config(name, **kwargs):
  defaults = {"task_feature_lengths": (16,), "batch_size": 4, "num_shards": 4}
  return DatasetConfig(seqio_dataset=SeqioDatasetConfig(name, **defaults | kwargs))


def texts_of(batches, tokenizer):
  """Returns every document, reassembled from the rows of its shard."""
  documents = []
  for rows in zip(*[zip(b.inputs, b.segment_ids, strict=True) for b in batches], strict=True):
    tokens = [t for inputs, segments in rows for t in inputs[segments > 0].tolist()]
    ends = [i for i, t in enumerate(tokens) if t == tokenizer.eos_id]
    starts = [0, *(e + 1 for e in ends)]
    documents += [tokenizer.decode(tokens[a:b]) for a, b in zip(starts, ends, strict=False)]
  return documents


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_files", [3, 4, 9])  # by example, by file, by files unevenly
def test_every_document_is_read_once(tmp_path, tokenizer, num_files, shuffle):
  documents = [f"{i} " * (i % 7 + 1) for i in range(60)]
  write_shards(tmp_path, "wiki", "validation", documents, num_files)
  stream = open_dataset(
    config("wiki", shuffle=shuffle),
    tokenizer,
    rows=range(4),
    data_dir=str(tmp_path),
    split_default="validation",
    repeat=False,
  )
  found = texts_of(list(stream), tokenizer)
  assert sorted(found) == sorted(documents)


def test_a_mixture_draws_by_its_rates(tmp_path, tokenizer):
  for source, text in (("cc_en", "if"), ("wiki", "for")):
    write_shards(tmp_path, source, "train", [text] * 40, 4)
  stream = open_dataset(
    config("wikipedia_mixture"), tokenizer, rows=range(4), data_dir=str(tmp_path)
  )
  inputs = np.concatenate([b.inputs for b in itertools.islice(stream, 100)])
  rare, common = (np.sum(inputs == tokenizer.encode(text)[0]) for text in ("if", "for"))
  assert rare + common > 2500
  # Four standard deviations of a share of 9.09 % of this many tokens.
  assert abs(rare / (rare + common) - 0.0909) < 4 * np.sqrt(0.0909 * 0.9091 / (rare + common))


def test_shards_of_a_mixture_draw_independently(tmp_path, tokenizer):
  for source, text in (("cc_en", "if"), ("wiki", "for")):
    write_shards(tmp_path, source, "train", [text] * 40, 4)
  stream = open_dataset(
    config("wikipedia_mixture", task_feature_lengths=(64,)),
    tokenizer, rows=range(4), data_dir=str(tmp_path),
  )  # fmt: skip
  rows = next(stream).inputs
  assert len({row.tobytes() for row in rows}) == 4


def flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def lose_text(file):
  import tensorflow as tf

  with tf.io.TFRecordWriter(str(file)) as writer:
    writer.write(tf.train.Example().SerializeToString())


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda file: file.write_bytes(file.read_bytes()[:-5]), "truncated record at "),
    (flip, "corrupted record at "),
    (lambda file: file.write_text("<!DOCTYPE html>" * 20), "corrupted record at 0 .Is this even"),
    (lose_text, "Feature: text .data type: string. is required but could not be found.$"),
  ],
)
@pytest.mark.parametrize("num_files", [3, 8])  # by example, by file
def test_a_damaged_shard_is_named(tmp_path, tokenizer, num_files, damage, message):
  write_shards(tmp_path, "wiki", "train", ["some text"] * 40, num_files)
  write_shards(tmp_path, "cc_en", "train", ["some text"] * 40, num_files)
  file = tmp_path / "wiki" / f"train-00002-of-{num_files:05d}.tfrecord"
  damage(file)
  mixture = config("wikipedia_mixture")
  stream = open_dataset(mixture, tokenizer, rows=range(4), data_dir=str(tmp_path))
  with pytest.raises(ValueError, match=f"^reading {file} failed: {message}"):
    list(itertools.islice(stream, 40))


def test_held_out_text_may_be_smaller_than_a_batch(tmp_path, tokenizer):
  write_shards(tmp_path, "wiki", "validation", ["one", "two"], 1)
  arguments = {"rows": range(4), "data_dir": str(tmp_path), "split_default": "validation"}
  (batch,) = open_dataset(config("wiki"), tokenizer, repeat=False, **arguments)
  assert sorted(texts_of([batch], tokenizer)) == ["one", "two"]
  assert not batch.mask[2:].any()


def test_data_repeats_after_its_end(tmp_path, tokenizer):
  write_shards(tmp_path, "wiki", "train", ["one", "two"], 1)
  options = config("wiki", num_shards=2, batch_size=2, pack=False)
  stream = open_dataset(options, tokenizer, rows=range(2), data_dir=str(tmp_path))
  texts = texts_of(list(itertools.islice(stream, 9)), tokenizer)
  assert sorted(texts) == ["one"] * 9 + ["two"] * 9


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_a_positive_number(rate):
  with pytest.raises(ValueError, match=f"rate of 'wiki' .*positive.* {rate!r}"):
    seqio_tasks.add_mixture("mixture_for_test", [("cc_en", 1.0), ("wiki", rate)])


def test_a_shard_without_documents_is_an_error(tmp_path, tokenizer):
  write_shards(tmp_path, "wiki", "train", ["one", "two"], 1)
  stream = open_dataset(config("wiki"), tokenizer, rows=range(4), data_dir=str(tmp_path))
  with pytest.raises(ValueError, match=r"wiki: .*no usable document; .*num_shards"):
    next(stream)


OWN_TASKS = """
import seqio, tensorflow as tf
from ll3m.data import mixtures, seqio_sources, seqio_tasks
from ll3m.data.seqio_vocabulary import RUN_VOCABULARY

numbered = seqio_sources.IndexedSource(lambda split: [f"{split} {i}" for i in range(9)])
seqio_tasks.add_text_task("own_text", numbered)
seqio_tasks.add_mixture("own_mixture", [("own_text", 3.0), ("python_reference", 1.0)])

def split(dataset, output_features):
  def cut(example):
    ids = output_features["targets"].vocabulary.encode_tf(example["text"])
    return {"inputs": ids[:2], "targets": ids[2:], "targets_loss": tf.range(tf.size(ids) - 2) % 2}
  return dataset.map(cut)

feature = seqio.Feature(RUN_VOCABULARY)
seqio.TaskRegistry.add(
  "own_prompts",
  source=seqio_sources.IndexedSource(lambda split: ["if x: return"] * 4),
  preprocessors=[split],
  output_features={"inputs": feature, "targets": feature, "targets_loss": feature},
  shuffle_buffer_size=None,
)
"""


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp("module")
  (folder / "own_tasks_for_test.py").write_text(OWN_TASKS)
  (folder / "broken_for_test.py").write_text("{}['oops']")
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield "own_tasks_for_test"


def test_tasks_of_a_users_module_are_read(own_tasks, tokenizer):
  stream = open_dataset(
    config("own_text", module=own_tasks), tokenizer, rows=range(4), repeat=False
  )
  assert sorted(texts_of(list(stream), tokenizer)) == [f"train {i}" for i in range(9)]
  mixed = open_dataset(config("own_mixture", module=own_tasks), tokenizer, rows=range(4))
  assert next(mixed).mask.any()


def test_features_before_the_last_carry_no_loss(own_tasks, tokenizer):
  ids = tokenizer.encode("if x: return")
  stream = open_dataset(
    config("own_prompts", module=own_tasks, task_feature_field=("inputs", "targets"),
           task_feature_lengths=(2, len(ids) - 2), batch_size=1, num_shards=1),
    tokenizer,
    rows=[0],
  )  # fmt: skip
  batch = next(stream)
  assert batch.inputs[0].tolist() == ids
  assert batch.mask[0].tolist() == [0.0, *(float(i % 2) for i in range(len(ids) - 2)), 0.0]


def documented_task():
  """Returns the example in docs/dataset.md that builds a task from seqio's preprocessors."""
  text = (Path(__file__).parents[2] / "docs" / "dataset.md").read_text()
  (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "prepend_bos" in b)
  return block


@pytest.mark.parametrize("bos", ["<s>", None])
def test_the_documented_task_has_bos_and_eos(tmp_path, train_tokenizer, bos, monkeypatch):
  from tokenizers import Tokenizer as Encoder

  folder = train_tokenizer(tmp_path / "tokenizer", bos=bos)
  encoder = Encoder.from_file(str(folder / "tokenizer.json"))
  encoder.no_truncation()
  encoder.no_padding()
  ids = encoder.encode("if x: return", add_special_tokens=False).ids
  head = [encoder.token_to_id(bos)] if bos else []
  expected = [*head, *ids, encoder.token_to_id("<|im_end|>")]

  (tmp_path / "documented_for_test.py").write_text(documented_task())
  monkeypatch.syspath_prepend(tmp_path)
  write_shards(tmp_path, "manuals", "train", ["if x: return"], 1)
  stream = open_dataset(
    config("manuals_with_bos", module="documented_for_test", batch_size=1, num_shards=1,
           task_feature_lengths=(len(expected),)),
    load_tokenizer(TokenizerConfig(path=str(folder))),
    rows=[0],
    data_dir=str(tmp_path),
  )  # fmt: skip
  batch = next(stream)
  stream.set_state(stream.state())  # its position can be saved
  assert batch.inputs[0].tolist() == next(stream).inputs[0].tolist() == expected


def test_bos_precedes_the_first_feature_and_is_not_trained(tokenizer):
  import tensorflow as tf

  with_bos = copy.copy(tokenizer)
  with_bos.bos_id = 7
  feature = seqio.Feature(RUN_VOCABULARY)
  names = {"inputs": feature, "targets": feature}
  row = {"inputs": [1, 2], "inputs_loss": [1, 1], "targets": [3]}
  dataset = tf.data.Dataset.from_tensors({k: tf.constant(v) for k, v in row.items()})
  with run_context.use(run_context.RunContext(with_bos)):
    (found,) = seqio_tasks.prepend_bos(dataset, names).as_numpy_iterator()
  assert {name: value.tolist() for name, value in found.items()} == {
    "inputs": [7, 1, 2], "inputs_loss": [0, 1, 1], "targets": [3],
  }  # fmt: skip


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"name": "own_txt"}, "unknown mixture or task 'own_txt' .*'own_text'"),
    ({"name": "own_text", "split": "test"}, "own_text .*train, validation, got 'test'"),
    ({"name": "own_text", "task_feature_field": ("inputs",)}, "features targets, .*inputs"),
    ({"name": "own_text", "module": "no_such_module"}, "'no_such_module' cannot be imported"),
    (
      {"name": "own_text", "module": "broken_for_test"},
      "'broken_for_test' cannot be imported: KeyError: 'oops'",
    ),
  ],
)
def test_names_that_a_module_lacks_are_refused(own_tasks, tokenizer, kwargs, message):
  with pytest.raises(ValueError, match=message):
    open_dataset(config(**{"module": own_tasks} | kwargs), tokenizer, rows=range(4))
