"""Tiny random checkpoints, written by the safetensors library rather than by LL3M."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ll3m import families
from ll3m.core.model_config import ModelConfig
from ll3m.families.family import Family
from ll3m.families.tensor_rules import expected_tensors
from ll3m.hf.lazy_tensor import LazyTensor, read_part

SIZES = {
  "vocab_size": 37,
  "d_model": 12,
  "d_ff": 20,
  "num_layers": 3,
  "num_heads": 3,
  "num_kv_heads": 1,
  "head_dim": 4,
  "max_positions": 32,
}


class Tiny(NamedTuple):
  folder: Path
  family: Family
  config: ModelConfig
  tensors: dict[str, np.ndarray]

  def save(self, tensors: dict[str, np.ndarray]) -> None:
    """Replaces the weights."""
    save_file(tensors, self.folder / "model.safetensors")


@pytest.fixture
def make_tiny(tmp_path) -> Callable[..., Tiny]:
  """Returns a function that writes a random checkpoint of a preset's family to disk.

  The folder is `tmp_path/published`.
  """

  def make(preset: str = "llama2_7b", dtype=ml_dtypes.bfloat16, **changes) -> Tiny:
    family, config = families.get_preset(preset)
    config = config.replace(**(SIZES | changes))
    random = np.random.default_rng(0)
    tensors = {
      name: random.standard_normal(spec.shape).astype(dtype)
      for name, spec in expected_tensors(family.rules, config).items()
    }
    tiny = Tiny(tmp_path / "published", family, config, tensors)
    tiny.folder.mkdir()
    hf_config = family.to_hf_config(config) | {"bos_token_id": 1, "eos_token_id": 2}
    (tiny.folder / "config.json").write_text(json.dumps(hf_config))
    tiny.save(tensors)
    return tiny

  return make


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
  assert actual.dtype == expected.dtype
  assert actual.shape == expected.shape
  assert np.ascontiguousarray(actual).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.fixture
def read_all() -> Callable[[LazyTensor], np.ndarray]:
  """Returns a function that reads a whole tensor."""
  return lambda tensor: read_part(tensor, tuple(slice(0, size) for size in tensor.shape))


@pytest.fixture
def same_bits() -> Callable[[np.ndarray, np.ndarray], None]:
  """Returns a function that asserts that two arrays have the same dtype, shape and bytes."""
  return assert_same_bits
