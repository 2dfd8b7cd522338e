"""A model in which a fixed token follows every token."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ll3m.families import get_preset
from ll3m.families.tensor_rules import expected_tensors

FAMILY, PRESET = get_preset("llama2_7b")


def write_successor_model(
  folder: Path, vocab_size: int, successors: Mapping[int, int], **config
) -> None:
  """Writes a published Llama of one layer that adds nothing to its embeddings.

  Args:
    folder: The folder for config.json and model.safetensors.
    vocab_size: V, at most 64.
    successors: The next token after each token; 0 follows all others.
    **config: More keys of config.json.
  """
  shape = PRESET.replace(
    vocab_size=vocab_size, d_model=64, d_ff=8, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=32, max_positions=128,
  )  # fmt: skip
  tensors = {
    name: np.zeros(spec.shape, np.float32)
    for name, spec in expected_tensors(FAMILY.rules, shape).items()
  }
  for name in tensors:
    if "norm" in name:
      tensors[name] += 1
  np.fill_diagonal(tensors["model.embed_tokens.weight"], 1)
  for token in range(vocab_size):
    tensors["lm_head.weight"][successors.get(token, 0), token] = 1
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(FAMILY.to_hf_config(shape) | config))
