"""Fixtures: a local Google Cloud Storage, its contents, and commands that access it."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ll3m import families
from ll3m.families.tensor_rules import expected_tensors
from tests.cloud.gcs_server import GcsServer
from tests.compiled import quickly
from tests.preloaded import Command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsServer]:
  with GcsServer("bucket") as server:
    yield server
  assert not server.refused  # no requests to other hosts, and none that the server does not know


@pytest.fixture(scope="session")
def environment(gcs, tmp_path_factory) -> dict[str, str]:
  return os.environ | quickly() | gcs.environment(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def start(environment) -> Iterator[Callable[..., Command | subprocess.Popen]]:
  """Starts `python -m ll3m.VERB`, or a file of tools/, in a process that talks to the server."""

  started = []

  def start(what: str, *arguments: str) -> Command | subprocess.Popen:
    if what.endswith(".py"):
      process = subprocess.Popen(
        [sys.executable, str(ROOT / what), *arguments],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      )  # fmt: skip
    else:
      process = Command(what, *arguments, env=environment)
    started.append(process)
    return process

  yield start
  for process in started:  # a failed test may have left some running
    process.kill()
    process.wait()
    if isinstance(process, subprocess.Popen):
      process.stdout.close()
      process.stderr.close()


@pytest.fixture(scope="session")
def end() -> Callable[[Command | subprocess.Popen], tuple[int, str, str]]:
  """Waits for a command, and returns its exit code, standard output and standard error."""

  def end(process: Command | subprocess.Popen) -> tuple[int, str, str]:
    try:
      printed, said = process.communicate(timeout=240)
    finally:
      process.kill()
    return process.returncode, printed, said

  return end


@pytest.fixture(scope="session")
def published(tmp_path_factory, byte_tokenizer) -> Path:
  """A tiny random Llama in the format of published models."""
  folder = tmp_path_factory.mktemp("published")
  shutil.copytree(byte_tokenizer, folder, dirs_exist_ok=True)
  family, config = families.get_preset("llama2_7b")
  config = config.replace(
    vocab_size=258, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
    max_positions=64,
  )  # fmt: skip
  (folder / "config.json").write_text(json.dumps(family.to_hf_config(config)))
  draw = functools.partial(np.random.default_rng(0).normal, 0, 0.02)
  specs = expected_tensors(family.rules, config)
  tensors = {name: draw(spec.shape).astype(np.float32) for name, spec in specs.items()}
  save_file(tensors, folder / "model.safetensors")
  return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
  """A JSONL file of 60 documents."""
  from pydoc_data.topics import topics

  path = tmp_path_factory.mktemp("text") / "text.jsonl"
  lines = (json.dumps({"id": name, "text": topics[name][:2000]}) for name in sorted(topics)[:60])
  path.write_text("".join(f"{line}\n" for line in lines))
  return path
