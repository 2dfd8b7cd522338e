"""The commands of README's walkthrough and of docs/dataset.md, run as documented.

They run in a new folder that represents the clone: `tools` and `.venv` are links, and PATH is as
after activating `.venv`. Only the replacements of `SHORTER` are made, and DOWNLOADED is a tiny
model.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ll3m import families
from ll3m.families.tensor_rules import expected_tensors
from tests.compiled import quickly

ROOT = Path(__file__).parents[1]
# Replacements for flags that take long or need a network.
SHORTER = (
  (r"--total_steps=\d+", "--total_steps=2"),
  (r"--eval_steps=\d+", "--eval_steps=2"),
  (r"HuggingFaceH4/no_robots", "my/robots"),
)
PRESET = families.get_preset("llama2_7b")
CONFIG = PRESET.config.replace(
  vocab_size=264, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
  max_positions=1024,
)  # fmt: skip


def blocks(document: str) -> list[str]:
  """Returns the blocks of shell commands of a document."""
  found = re.findall(
    r"^```shell\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL
  )
  return [_shorter(block) for block in found]


def _shorter(commands: str) -> str:
  for pattern, replacement in SHORTER:
    commands = re.sub(pattern, replacement, commands)
  return commands


@pytest.fixture(scope="module")
def clone(tmp_path_factory, byte_tokenizer) -> Path:
  """The state of a clone after README's first block, with a tiny model as DOWNLOADED."""
  clone = tmp_path_factory.mktemp("clone")
  (clone / "tools").symlink_to(ROOT / "tools")
  (clone / ".venv").symlink_to(sys.prefix)
  downloaded = clone / "DOWNLOADED"
  downloaded.mkdir()
  for file in byte_tokenizer.iterdir():
    (downloaded / file.name).write_bytes(file.read_bytes())
  (downloaded / "config.json").write_text(json.dumps(PRESET.family.to_hf_config(CONFIG)))
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(0, 0.1, spec.shape).astype(np.float32)
    for name, spec in expected_tensors(PRESET.family.rules, CONFIG).items()
  }
  save_file(tensors, downloaded / "model.safetensors")
  return clone


@pytest.fixture(scope="module")
def shell(clone, shell_python):
  """Returns a function that runs commands in the clone until one fails, and returns the output."""

  def run(commands: str) -> str:
    foreign = ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS", "LL3M_DATA_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in foreign} | quickly()
    environment["PATH"] = f"{shell_python}:{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
      ["bash", "-e", "-c", commands],
      cwd=clone, env=environment, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout

  return run


@pytest.fixture(scope="module")
def journey(shell) -> str:
  """The output of the commands of README's walkthrough."""
  (commands,) = (block for block in blocks("README.md") if "ll3m.convert" in block)
  return shell(commands)


def test_commands_of_the_readme_walkthrough(journey, clone):
  assert re.search(r"^converted +llama, ", journey, re.MULTILINE)
  assert re.search(r"^exported +llama, ", journey, re.MULTILINE)
  assert re.search(r"^loss +\d\.\d+ nats", journey, re.MULTILINE)
  assert (clone / "runs" / "mine" / "checkpoints" / "2").is_dir()
  assert (clone / "exported" / "model.safetensors").is_file()


def test_the_file_that_readme_copies_exists_in_the_package(shell, clone, smollm2_gguf):
  (command,) = (block for block in blocks("README.md") if block.startswith("mkdir DOWNLOADED"))
  shell(f"mkdir elsewhere && cd elsewhere && ln -s ../.venv . && {command}")
  (copied,) = (clone / "elsewhere" / "DOWNLOADED").iterdir()
  assert copied.name == smollm2_gguf.name and copied.stat().st_size == smollm2_gguf.stat().st_size


def test_commands_of_the_dataset_document(journey, shell, clone):
  """Runs each command; blocks with flags only are added to a short training command."""
  (clone / "my" / "robots").mkdir(parents=True)
  document = (ROOT / "docs" / "dataset.md").read_text()
  line = re.search(r'\{"prompt": .*?"\}', document)[0]
  (clone / "my" / "lines.jsonl").write_text(f"{line}\n" * 9)
  (clone / "my" / "robots" / "train.jsonl").write_text('{"text": "hello"}\n')
  (clone / "dolma").mkdir()
  for source in ("wiki-1", "cc_en_head-1"):
    with gzip.open(clone / "dolma" / f"{source}.json.gz", "wt") as file:
      rows = ({"id": str(i), "text": f"document {i} of {source}"} for i in range(400))
      file.writelines(f"{json.dumps(row)}\n" for row in rows)
  # tests/data/test_seqio_tasks.py tests the next block, a task with BOS.
  module, _ = re.findall(r"^```python\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
  (clone / "my_tasks.py").write_text(module)
  (clone / "data").mkdir()
  (clone / "data" / "manuals").symlink_to("wiki")

  commands = [block for block in blocks("docs/dataset.md") if not block.startswith("  --")]
  added = [block for block in blocks("docs/dataset.md") if block.startswith("  --")]
  assert len(commands) == 2 and len(added) == 3
  for block in commands:
    shell(block)
  assert (clone / "runs" / "answers" / "checkpoints" / "1").is_dir()
  assert (clone / "runs" / "wikipedia" / "checkpoints" / "2").is_dir()
  own = "python -m ll3m.train --load_checkpoint=params::checkpoints/my-model --total_steps=1 \\\n"
  hub, mixture, gin = (block.strip() for block in added)
  shell(f"{own}{hub} --logger.output_dir=runs/hub --dry_run")
  shell(f"{own}{mixture} {gin} --logger.output_dir=runs/manuals")
  assert (clone / "runs" / "manuals" / "checkpoints" / "1").is_dir()
