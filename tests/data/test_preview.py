"""Batches as text; the expected texts are written by hand."""

import io
import json

import numpy as np
import pytest

from ll3m.data.batch import Batch
from ll3m.data.config import TokenizerConfig
from ll3m.data.preview import show, trained_tokens
from ll3m.data.tokenizer import load_tokenizer
from tests import tiny_runs


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
  return load_tokenizer(TokenizerConfig(path=str(byte_tokenizer)))


def make_batch(tokenizer) -> Batch:
  """Returns two rows of 8 tokens: a prompt "a\\n" with the answer "é", and "b"; then padding."""
  bos, eos = tokenizer.token_id("<s>"), tokenizer.eos_id
  first = [bos, *tokenizer.encode("a\né"), eos, bos, *tokenizer.encode("b")]
  inputs = np.array([first, [0] * 8], np.int32)
  mask = np.zeros((2, 8), np.float32)
  mask[0, 2:5] = 1  # the two bytes of é, and EOS
  segments = np.array([[1] * 6 + [2] * 2, [0] * 8], np.int32)
  return Batch(inputs, np.roll(inputs, -1), mask, segments, np.zeros_like(segments))


def shown(batch, tokenizer, **options) -> str:
  file = io.StringIO()
  show(batch, tokenizer, file=file, **options)
  return file.getvalue()


def test_tokens_documents_and_loss_are_shown(tokenizer):
  assert shown(make_batch(tokenizer), tokenizer) == (
    "row 0: 2 documents, 8 of 8 tokens used, 3 trained\n"
    "-- document 1: 6 tokens, 3 trained\n"
    "<s>|a|↵\n|[]|[é]|[</s>]\n"  # a character is shown at its last byte
    "-- document 2: 2 tokens, 0 trained\n"
    "<s>|b\n\n"
    "row 1: 0 documents, 0 of 8 tokens used, 0 trained\n\n"
  )


def test_colors_replace_brackets(tokenizer):
  text = shown(make_batch(tokenizer), tokenizer, rows=1, color=True)
  assert "\033[1;32m</s>\033[0m" in text and "\033[2ma\033[0m" in text and "[</s>]" not in text


def test_micro_batches_are_shown_row_by_row(tokenizer):
  batch = make_batch(tokenizer)
  stacked = Batch(*(array[:, None] for array in batch))
  assert shown(stacked, tokenizer) == shown(batch, tokenizer)


def test_a_mask_belongs_to_the_next_token(tokenizer):
  row = Batch(*(array[0] for array in make_batch(tokenizer)))
  assert trained_tokens(row).tolist() == [False] * 3 + [True] * 3 + [False] * 2


@pytest.mark.parametrize("arguments", [["--dry_run"], ["--total_steps=2"]])
def test_a_run_shows_its_first_batches_and_trains_on_them(
  run_command, byte_tokenizer, tmp_path, arguments
):
  rows = "".join(json.dumps({"p": f"q{i} ", "a": f"r{i}"}) + "\n" for i in range(40))
  (tmp_path / "rows.jsonl").write_text(rows)
  done = run_command(
    "train", *tiny_runs.flags(byte_tokenizer, rows=2, shards=1),
    "--train_dataset.type=json", f"--train_dataset.json_dataset.path={tmp_path / 'rows.jsonl'}",
    "--train_dataset.text_processor.fields=[p],a", f"--logger.output_dir={tmp_path / 'run'}",
    "--show_batches=2", *arguments,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert [line for line in done.stdout.splitlines() if line.startswith("==")] == [
    "== batch 0", "== batch 1",
  ]  # fmt: skip
  assert "|[r]|[" in done.stdout and "[q]" not in done.stdout
