"""The export command; tests/hf/test_exporting.py tests the exported folder."""

import functools
from pathlib import Path

import ml_dtypes  # registers bfloat16, which safetensors looks up by name
import numpy as np
from safetensors.numpy import load_file

from ll3m.hf.conversion import convert_model
from ll3m.hf.model_files import open_model
from tests.calling import call

FIXTURE = Path(__file__).parent / "fixtures" / "parity" / "llama2_modern"


export = functools.partial(call, "export")


def test_exports_shards_in_another_dtype(tmp_path):
  convert_model(open_model(FIXTURE), tmp_path / "converted")
  output = tmp_path / "exported"
  done = export(
    f"--checkpoint={tmp_path / 'converted'}", f"--output_dir={output}",
    "--dtype=bf16", "--max_shard_size=10KB",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "export: 100%" in done.stderr
  assert "llama, 15,336 parameters\n" in done.stdout and " 21 of bfloat16\n" in done.stdout
  found = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
  expected = load_file(FIXTURE / "model.safetensors")
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_array_equal(found[name], values.astype(ml_dtypes.bfloat16))


def test_an_unfinished_checkpoint_is_rejected(tmp_path):
  (tmp_path / "params").mkdir()
  done = export(f"--checkpoint={tmp_path}", f"--output_dir={tmp_path / 'exported'}")
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith(
    f"error: not a complete checkpoint: {tmp_path} has no ll3m.json"
  )
  assert not (tmp_path / "exported").exists()


def test_a_published_folder_is_rejected(tmp_path):
  done = export(f"--checkpoint=hf::{FIXTURE}", f"--output_dir={tmp_path / 'exported'}")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == (
    f"error: --checkpoint must be a converted folder or a run, got hf::{FIXTURE}, which is already "
    "a Hugging Face folder"
  )
