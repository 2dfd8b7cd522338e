"""The text model of a multimodal Gemma 3, made from the fixture of the text model."""

import json
import re
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ll3m import convert, families
from ll3m.hf.model_files import open_model

TEXT = Path(__file__).parents[1] / "fixtures" / "parity" / "gemma3"
VISION = {
  "vision_tower.vision_model.post_layernorm.weight": np.zeros(3, np.float32),
  "multi_modal_projector.mm_input_projection_weight": np.ones((3, 2), np.float32),
}


@pytest.fixture(params=["before", "since"])
def multimodal(request, tmp_path):
  """A checkpoint with the names before or since transformers 4.52."""
  folder = tmp_path / "multimodal"
  shutil.copytree(TEXT, folder)
  text = json.loads((TEXT / "config.json").read_text())
  own = {key: text.pop(key) for key in ("bos_token_id", "eos_token_id", "torch_dtype")}
  config = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "text_config": text, "vision_config": {"model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 256, "image_token_index": 262_144, **own,
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(config))
  tensors = load_file(TEXT / "model.safetensors")
  if request.param == "before":
    named = {f"language_model.{name}": tensor for name, tensor in tensors.items()} | VISION
  else:
    named = {name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}
    named |= {f"model.{name}": tensor for name, tensor in VISION.items()}
  save_file(named, folder / "model.safetensors")
  return folder


def test_the_text_model_has_the_parameters_of_a_text_checkpoint(multimodal, tmp_path, capsys):
  output = tmp_path / "converted"
  arguments = [f"--checkpoint_dir={multimodal}", f"--output_dir={output}", "--text_only"]
  assert convert.main(arguments) == 0
  printed = capsys.readouterr().out
  assert all(name in printed for name in VISION)
  found, expected = open_model(multimodal, text_only=True), open_model(TEXT)
  assert found.config == expected.config
  chex.assert_trees_all_equal(found.load_params(), expected.load_params())
  saved = json.loads((output / "hf" / "config.json").read_text())
  assert saved["architectures"] == ["Gemma3ForCausalLM"]
  assert (saved["bos_token_id"], saved["eos_token_id"]) == (2, 1)


def test_sizes_that_the_text_config_omits_are_those_of_transformers(multimodal):
  config = json.loads((multimodal / "config.json").read_text())
  # The text_config of the published 4B model.
  config["text_config"] = {
    "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text",
    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  }  # fmt: skip
  (multimodal / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="does not match its gemma3 config of 34 layers"):
    open_model(multimodal, text_only=True)
  preset = families.get_preset("gemma3_4b").config
  with pytest.raises(ValueError, match="expected one"):
    families.from_hf_config(config)
  from ll3m.hf.multimodal import text_model

  read = families.from_hf_config(text_model(config, {}).config).config
  assert read == preset.replace(query_pre_attn_scalar=256.0)


def test_a_multimodal_model_is_opened_only_if_asked_for(multimodal):
  message = "holds a multimodal model (gemma3), of which only the text model is supported: convert"
  with pytest.raises(NotImplementedError, match=re.escape(message)):
    open_model(multimodal)
  with pytest.raises(ValueError, match="`text_only` is for multimodal models"):
    open_model(TEXT, text_only=True)
