"""The convert command; tests/hf/test_conversion.py tests the converted folder."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from tests.calling import call

FIXTURES = Path(__file__).parent / "fixtures" / "parity"


convert = functools.partial(call, "convert")


def test_converts_and_reports_ignored_tensors(tmp_path):
  """Uses --output_file, the reference's spelling of --output_dir."""
  output = tmp_path / "converted"
  done = convert(f"--checkpoint_dir={FIXTURES / 'open_llama_sharded'}", f"--output_file={output}")
  assert done.returncode == 0, done.stderr
  assert "convert: 100%" in done.stderr and "B/s" in done.stderr
  assert "omitted 2 tensors" in done.stdout
  assert "  model.layers.1.self_attn.rotary_emb.inv_freq\n" in done.stdout
  assert "llama, 30,680 parameters" in done.stdout
  assert json.loads((output / "ll3m.json").read_text())["family"] == "llama"


@pytest.fixture
def broken(tmp_path):
  """A checkpoint with a truncated weight file."""
  folder = shutil.copytree(FIXTURES / "llama2", tmp_path / "broken")
  weights = folder / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-100])
  return folder


def test_an_error_is_one_sentence_and_nothing_is_written(broken, tmp_path):
  output = tmp_path / "converted"
  done = convert(f"--checkpoint_dir={broken}", f"--output_dir={output}", "--dtype=f32")
  assert done.returncode == 1
  assert not output.exists()
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f"error: {broken / 'model.safetensors'} is truncated: expected ")
  assert "Traceback" not in done.stderr


def test_two_different_output_folders_are_rejected(broken):
  done = convert(f"--checkpoint_dir={broken}", "--output_dir=a", "--output_file=b")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    "error: --output_dir=a and --output_file=b differ; give one"
  )
