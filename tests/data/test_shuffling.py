"""The order of examples; the oracles are TensorFlow's own operations and recorded batches.

`tests/fixtures/data_order.npz` was recorded from commit 13116dc, when tf.data shuffled the numbers
of json and huggingface rows. It holds the first batches of each of `CASES`, made with the tokenizer
below.
"""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from ll3m.data import huggingface, jsonl
from ll3m.data.shuffling import NumberOrder, Philox, permute
from ll3m.data.tokenizer import Tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "data_order.npz"
FILES = {"one": range(700), "a": range(50), "b": range(50, 73), "c": range(73, 99),
         "hub/part0": range(90), "hub/part1": range(90, 180)}  # fmt: skip
SMALL = {"path": "[abc].jsonl", "num_shards": 3}  # three files, read in several passes
HUB = {"path": "hub", "seed": 42}
STREAM = HUB | {"streaming": True}
CASES = {
  "shuffled": {"path": "one.jsonl", "num_shards": 8, "seed": 0},
  "shuffled-1-shard": {"path": "one.jsonl", "num_shards": 1, "seed": 3},
  "passes-of-a-small-file": SMALL | {"seed": 42},
  "in-order": SMALL | {"seed": 1, "shuffle": False},
  "once": SMALL | {"seed": 1, "shuffle": False, "repeat": False},
  "shuffled-once": SMALL | {"num_shards": 8, "seed": 7, "repeat": False},
  "not-packed": SMALL | {"seed": 5, "pack": False},
  "prompts": SMALL | {"seed": 2**40 + 9, "fields": "[prompt],text"},
  "few-rows": {"path": "c.jsonl", "num_shards": 64, "seed": -5},
  "huggingface": HUB | {"num_shards": 3},
  "huggingface-streamed": STREAM | {"num_shards": 2},
  "huggingface-streamed-by-example": STREAM | {"num_shards": 4},
  "huggingface-streamed-once": STREAM | {"num_shards": 4, "repeat": False, "shuffle": False},
}


class Characters(Tokenizer):
  """A tokenizer whose tokens are characters, because a trained one might change."""

  prefix, bos_id, eos_id, vocab_size = [1], 1, 2, 300
  chat_template, fingerprint = None, "characters"

  def __init__(self):
    pass

  def encode(self, text):
    return [3 + ord(character) for character in text]

  def encode_batch(self, texts):
    return [(self.encode(text), inside(text, spans)) for text, spans in texts]


def inside(text, spans):
  spans = [(0, len(text))] if spans is None else spans
  return np.array([any(a <= i < b for a, b in spans) for i in range(len(text))], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rows")
  (folder / "hub").mkdir()
  for name, numbers in FILES.items():
    rows = ({"prompt": f"{i}?", "text": f"{i}: " + "if x: " * (i * i % 29)} for i in numbers)
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield folder


def opened(folder, case):
  read = huggingface if case["path"] == "hub" else jsonl
  arguments = case | {"path": str(folder / case["path"])}
  return read(tokenizer=Characters(), batch_size=4, length=32, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_batches_equal_the_recorded_ones(folder, name):
  with np.load(FIXTURE) as recorded:
    expected = {field: recorded[f"{name}.{field}"] for field in ("inputs", "segment_ids", "mask")}
  count = len(expected["inputs"])
  stream = opened(folder, CASES[name])
  first = list(itertools.islice(stream, count // 2))
  resumed = opened(folder, CASES[name])
  resumed.set_state(stream.state())  # within a pass, with full and with partly empty buffers
  batches = [*first, *itertools.islice(resumed, count - count // 2)]
  for field, values in expected.items():
    np.testing.assert_array_equal([getattr(batch, field) for batch in batches], values)
  if not CASES[name].get("repeat", True):
    assert next(resumed, None) is None


@pytest.mark.parametrize("last", [1, 2, 98, 255, 65535, 65537, 2**17, 300_000, 5_000_000, 2**33])
def test_the_permutation_equals_tensorflows(last):
  import tensorflow as tf

  indices = sorted({0, 1, last // 3, last // 2, last - 1, last})
  for seed in (0, 1, 42, -5, 2**40 + 9):
    expected = tf.random.experimental.index_shuffle(
      tf.constant(indices, tf.int64), tf.constant([seed, 0], tf.int64), tf.constant(last, tf.int64)
    )
    assert permute(indices, seed=seed, last=last).tolist() == expected.numpy().tolist()


@pytest.mark.parametrize("last", [0, 1, 6, 1000, 65536, 70_000, 2**18])
def test_a_permutation_has_every_number_once(last):
  assert sorted(permute(range(last + 1), seed=3, last=last)) == list(range(last + 1))


@pytest.mark.parametrize(
  ("counter", "key", "expected"),
  [  # Known answers of philox4x32 10 from Random123.
    (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (2**64 - 1, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
  ],
)
def test_random_numbers_equal_the_known_answers_of_philox(counter, key, expected):
  block = counter  # the lower half of the counter, which equals the upper half in these answers
  draws = Philox(key, counter)
  assert [draws(4 * block + i) for i in range(4)] == expected


@pytest.mark.parametrize(("count", "shards"), [(20, 1), (700, 1), (1999, 3), (5, 5)])
def test_a_shuffled_shard_equals_tensorflows_shuffle_of_the_permutation(count, shards):
  import tensorflow as tf

  for seed in (0, 42, -5):
    shard = shards - 1
    permuted = permute(range(shard, count, shards), seed=seed, last=count - 1)
    passes = tf.data.Dataset.from_tensor_slices(permuted).shuffle(512, seed=seed)
    # With `map` between, tf.data does not fuse shuffle and repeat, which draws other numbers.
    expected = [*passes.map(lambda number: number * 1).repeat(3).as_numpy_iterator()]
    order = NumberOrder(count, shard=shard, num_shards=shards, shuffle_seed=seed)
    assert list(itertools.islice(order, len(expected))) == expected


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("repeat", [False, True])
def test_any_position_can_be_saved_and_restored(seed, repeat):
  def order():
    return NumberOrder(700, shard=0, num_shards=1, shuffle_seed=seed, passes=None if repeat else 1)

  whole = list(itertools.islice(order(), 1500))
  for place in (0, 1, 187, 188, 189, 690, 699, 700, 701, 1399):
    one, other = order(), order()
    list(itertools.islice(one, place))
    other.set_state(json.loads(json.dumps(one.state())))
    assert list(itertools.islice(other, 1500 - place)) == whole[place:]
