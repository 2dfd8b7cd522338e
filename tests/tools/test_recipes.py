"""Checks the flags of the recipes and plans their runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tools" / "recipes" / "llama2_7b_wikipedia.sh"
# Sizes that compile in seconds.
SMALL = (
  "--update_model_config=d_model=256,d_ff=512,num_layers=2,num_heads=4,num_kv_heads=4,head_dim=64,"
  "vocab_size=4096",
  "--train_dataset.seqio_dataset.task_feature_lengths=(256,)",
)


@pytest.fixture
def run(shell_python):
  """Returns a function that runs the recipe."""

  def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{shell_python}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "BUCKET")}
    return subprocess.run(
      ["bash", str(RECIPE), *arguments],
      env=inherited | {"PATH": path} | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

  return run


def test_the_recipe_has_every_flag_of_the_reference():
  described = (ROOT / "tests" / "test_reference_command.py").read_text()
  names = set(re.findall(r"--([a-z_.]+)=", described.partition('"train",')[2].partition("env=")[0]))
  own = set(re.findall(r"--([a-z_.]+)=", RECIPE.read_text()))
  # update_model_config is added by the test of the reference command.
  assert len(names) > 20 and names - own == {"update_model_config"}


def test_a_dry_run_plans_the_run(run):
  done = run("--dry_run", *SMALL)
  assert done.returncode == 0, done.stderr
  assert "64 devices of TPU v3 on 32 chips" in done.stdout
  assert "32 x 4 sequences of 256 tokens = 32,768 tokens" in done.stdout
  assert "\nfits\n" in done.stdout
  assert "TPU v3 has no kernels" in done.stdout


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--optimizer.type=adam", "--optimizer.type"),
    ("--load_checkpoint=weights", "--load_checkpoint expects one of params::PATH"),
    ("--gin_bindings=data.nothing.name=1", "data.nothing"),
  ],
)
def test_a_dry_run_checks_the_flags(run, flag, message):
  done = run("--dry_run", flag)
  assert done.returncode in (1, 2)
  assert done.stderr.startswith("error: ") and message in done.stderr


def test_a_run_requires_a_bucket(run):
  done = run()
  assert done.returncode != 0
  assert "set BUCKET to the gs:// folder" in done.stderr
