import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "parity" / "gemma_2b"
VOCABULARY, MAX_POSITIONS = 101, 64


def run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, str(ROOT / "tools" / "logits.py"), *arguments]
  return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_logits_match_transformers(tmp_path):
  expected = np.load(FIXTURE / "expected.npz")
  np.save(tmp_path / "tokens.npy", expected["tokens"].astype(np.int64))
  output = tmp_path / "new" / "logits.npy"
  done = run(
    f"--checkpoint=hf::{FIXTURE}", f"--tokens={tmp_path / 'tokens.npy'}", f"--output={output}"
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == f"wrote float32 logits [2, 19, 101] to {output}"
  assert [path.name for path in output.parent.iterdir()] == ["logits.npy"]
  logits = np.load(output)
  assert logits.dtype == np.float32
  largest = np.abs(expected["logits"]).max()
  np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=6e-6 * largest)


@pytest.mark.parametrize(
  ("tokens", "sentence"),
  [
    (np.full((1, 3), VOCABULARY), "token ids must be at least 0 and below 101, got 101"),
    (np.full((1, 3), -1), "token ids must be at least 0 and below 101, got -1"),
    (np.zeros((1, MAX_POSITIONS + 1), int), "at most 64 tokens for this model, got 65"),
    (np.zeros(3, int), "must have the shape [B, T], got [3]"),
    (np.zeros((2, 0), int), "must have the shape [B, T], got [2, 0]"),
    (np.zeros((1, 3)), "must hold integers, got float64"),
    (b"text", "is not a .npy file of numbers"),
    (None, "error: --tokens: no such file: "),
  ],
)
def test_invalid_tokens_give_an_error_of_one_sentence(tmp_path, tokens, sentence):
  path = tmp_path / "tokens.npy"
  if isinstance(tokens, bytes):
    path.write_bytes(tokens)
  elif tokens is not None:
    np.save(path, tokens)
  output = tmp_path / "logits.npy"
  done = run(f"--checkpoint=hf::{FIXTURE}", f"--tokens={path}", f"--output={output}")
  assert done.returncode == (2 if tokens is None else 1)
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: ")
  assert sentence in last
  assert "Traceback" not in done.stderr
  assert not output.exists()


def test_a_missing_flag_is_reported():
  done = run("--tokens=tokens.npy", "--output=logits.npy")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == "error: --checkpoint must be given"
