"""Runs on json and huggingface data import neither TensorFlow nor seqio from start to end."""

import subprocess
import sys

PROGRAM = """
import itertools, sys
import ll3m.data
from ll3m.data import run_context
from ll3m.data.batching import open_dataset
from ll3m.data.config import (
  DatasetConfig, HuggingFaceDatasetConfig, JsonDatasetConfig, SeqioDatasetConfig, TokenizerConfig
)
from ll3m.data.dataset_spec import resolve
from ll3m.data.tokenizer import load_tokenizer
import ll3m.evaluate, ll3m.training.run

tokenizer, path = load_tokenizer(TokenizerConfig(path=sys.argv[1])), sys.argv[2]
stream = ll3m.data.jsonl(path, tokenizer, batch_size=2, length=16)
next(stream)
state = stream.state()
expected = next(stream).inputs.tolist()
stream.set_state(state)
assert next(stream).inputs.tolist() == expected

cut = SeqioDatasetConfig(batch_size=2, task_feature_lengths=(16,))
folder = path.rpartition("/")[0]
for dataset in (
  DatasetConfig(type="json", seqio_dataset=cut, json_dataset=JsonDatasetConfig(path)),
  DatasetConfig(data=folder, seqio_dataset=cut),
  *(
    DatasetConfig(
      type="huggingface",
      seqio_dataset=cut,
      huggingface_dataset=HuggingFaceDatasetConfig(folder, split="train", streaming=streaming),
    )
    for streaming in (False, True)
  ),
):
  train = open_dataset(resolve(dataset), tokenizer, rows=range(2))
  list(itertools.islice(train, 3))
  train.set_state(train.state())
  next(train)
  held_out = resolve(dataset, is_evaluation=True)
  assert list(open_dataset(held_out, tokenizer, rows=range(2)))
assert not {"tensorflow", "seqio"} & set(sys.modules), {"tensorflow", "seqio"} & set(sys.modules)
"""


def test_reading_rows_imports_neither_tensorflow_nor_seqio(
  write_jsonl, folder, tmp_path, monkeypatch
):
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  (tmp_path / "rows").mkdir()
  path = write_jsonl(*({"text": f"row {i}"} for i in range(20)), name="rows/data.jsonl")
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, str(folder), path], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
