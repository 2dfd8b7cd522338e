"""Every command that accepts a model describes folders that hold something else."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from ll3m.hf.model_files import open_model
from ll3m.hf.model_source import open_converted, open_source

LORA = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "r": 8}
MLX = {"fine_tune_type": "lora", "model": "mlx-community/x"}


def refusals(folder):
  """Returns the errors of convert, hf:: and --checkpoint for a folder."""
  said = []
  for attempt in (
    lambda: open_model(folder),
    lambda: open_source(f"hf::{folder}"),
    lambda: open_source(str(folder)),
  ):
    with pytest.raises((ValueError, NotImplementedError)) as error:
      attempt()
    said.append(str(error.value))
  return said


@pytest.mark.parametrize(
  ("settings", "weights", "said"),
  [
    (LORA, "adapter_model.safetensors", "a LoRA adapter of meta-llama/Llama-2-7b-hf"),
    (LORA, "adapter_model.bin", "a LoRA adapter of meta-llama/Llama-2-7b-hf"),
    (LORA | {"peft_type": "IA3"}, None, "an IA3 adapter of meta-llama/Llama-2-7b-hf"),
    (LORA | {"base_model_name_or_path": None}, None, "a LoRA adapter of an unnamed base"),
    (MLX, "adapters.safetensors", "a LoRA adapter of mlx-community/x"),
    ([], "adapter_model.safetensors", "a PEFT adapter of an unnamed base"),
  ],
)
def test_an_adapter_is_reported_with_its_base(tmp_path, settings, weights, said):
  (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
  (tmp_path / "tokenizer.json").write_text("{}")
  if weights:
    save_file({"x.lora_A.weight": np.zeros((2, 2), np.float32)}, tmp_path / weights)
  for message in refusals(tmp_path):
    assert message.startswith(f"{tmp_path} holds {said}, not a model: merge it into its base")


def test_a_model_beside_an_adapters_config_is_read(make_tiny):
  tiny = make_tiny()
  (tiny.folder / "adapter_config.json").write_text(json.dumps(LORA))
  save_file({"x.lora_A.weight": np.zeros((2, 2))}, tiny.folder / "adapter_model.safetensors")
  assert open_model(tiny.folder).config == tiny.config


@pytest.mark.parametrize(
  ("names", "said"),
  [
    (
      ("consolidated.00.pth", "params.json", "tokenizer.model"),
      "a model in Meta's original format",
    ),
    (("consolidated.safetensors", "params.json"), "a model in Mistral's own format"),
    (("tf_model.h5", "config.json"), "a TensorFlow model (tf_model.h5)"),
    (("flax_model.msgpack", "config.json"), "a Flax model (flax_model.msgpack)"),
    (("decoder_model.onnx", "config.json"), "an ONNX model (decoder_model.onnx)"),
    (("weights.00.npz", "config.json"), "an MLX model (weights.00.npz)"),
    (("model.pth", "training_args.bin", "rng_state.pth"), "a model saved by torch (.pth) (model.p"),
  ],
)
def test_weights_of_other_formats_are_reported(tmp_path, names, said):
  for name in names:
    (tmp_path / name).write_text("{}")
  for message in refusals(tmp_path):
    assert message.startswith(f"{tmp_path} holds {said}")
    assert "expected Hugging Face's format" in message


def test_subfolders_that_hold_models_are_listed(tmp_path):
  (tmp_path / "trainer_state.json").write_text("{}")
  for name in ("checkpoint-500", "checkpoint-1000", "logs"):
    (tmp_path / name).mkdir()
  for name in ("checkpoint-500", "checkpoint-1000"):
    (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / name / "model.safetensors").write_text("{}")
  for message in refusals(tmp_path):
    assert message == (
      f"{tmp_path} holds no model, but its subfolders do; give one of them "
      f"(checkpoint-1000, checkpoint-500)"
    )


def test_an_unfinished_conversion_is_reported_as_incomplete(tmp_path):
  (tmp_path / "hf").mkdir()
  (tmp_path / "hf" / "config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"complete checkpoint.* ll3m.json"):
    open_source(str(tmp_path))


def test_published_and_converted_models_are_told_apart(make_tiny, tmp_path):
  tiny = make_tiny()
  (tmp_path / "model.gguf").write_bytes(b"GGUF")
  for folder in (tiny.folder, tmp_path):
    said = f"{folder} is a published model, not a converted one"
    with pytest.raises(ValueError, match=re.escape(said)):
      open_converted(str(folder))
  (tmp_path / "model.gguf").unlink()
  (tmp_path / "ll3m.json").write_text("{}")
  with pytest.raises(NotImplementedError, match="is already converted .* without hf::"):
    open_source(f"hf::{tmp_path}")


@pytest.mark.parametrize(
  ("tensors", "said"),
  [
    ({"model.layers.0.mlp.up_proj.qweight": np.int32}, "GPTQ or AWQ: model.layers.0.mlp.up_proj"),
    ({"model.norm.weight_scale_inv": np.float32}, "FP8: model.norm.weight_scale_inv of float32"),
    ({"lm_head.weight": np.int8}, "int8: lm_head.weight of int8"),
    ({"lm_head.weight": np.uint8}, "int8: lm_head.weight of uint8"),
    ({"model.layers.0.mlp.up_proj.SCB": np.float32}, "bitsandbytes: model.layers.0.mlp.up_proj.S"),
    ({"a.weight.absmax": np.float32}, "bitsandbytes: a.weight.absmax"),
    ({"a.weight.quant_state.bitsandbytes__nf4": np.uint8}, "bitsandbytes: a.weight.quant_state"),
    ({"a.weight_packed": np.int32}, "compressed-tensors: a.weight_packed"),
    ({"a.gate_up_proj_blocks": np.uint8}, "MXFP4: a.gate_up_proj_blocks"),
    ({"a.scales": np.float16}, "MLX: a.scales"),
  ],
)
def test_quantised_weights_are_recognised_by_their_names_and_dtypes(make_tiny, tensors, said):
  tiny = make_tiny()
  tiny.save(tiny.tensors | {name: np.zeros((2, 2), dtype) for name, dtype in tensors.items()})
  with pytest.raises(NotImplementedError, match=re.escape(f"holds quantised weights ({said}")):
    open_model(tiny.folder)


def test_a_quantisation_in_config_json_is_rejected_before_weights_are_read(make_tiny):
  tiny = make_tiny()
  config = json.loads((tiny.folder / "config.json").read_text())
  config["quantization_config"] = {"quant_method": "fp8"}
  (tiny.folder / "config.json").write_text(json.dumps(config))
  (tiny.folder / "model.safetensors").write_bytes(b"of a dtype that is not known")
  with pytest.raises(NotImplementedError, match="quant_method 'fp8'"):
    open_model(tiny.folder)


def test_float8_weights_are_rejected(make_tiny):
  """Edits the header of a file, because no installed library writes float8 safetensors."""
  tiny = make_tiny(dtype=np.float16)
  tiny.save(tiny.tensors | {"model.norm.weight": np.zeros(12, np.int8)})
  file = tiny.folder / "model.safetensors"
  file.write_bytes(file.read_bytes().replace(b'"I8"', b'"F8_E4M3"').replace(b"     ", b"", 1))
  with pytest.raises(NotImplementedError, match=r"FP8: model.norm.weight of float8_e4m3fn"):
    open_model(tiny.folder)
