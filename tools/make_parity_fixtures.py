"""Writes tiny random Hugging Face checkpoints and the results of transformers on them.

Each family and variant gets a folder under tests/fixtures/parity. It holds the checkpoint, with the
files of the published model of the same name, and expected.npz with the tokens, transformers'
float32 logits, the mean next-token loss and the norm of the loss's gradient for every tensor. All
weights are random, including norm weights, biases and heads, so that a missing or misplaced one
changes the results.

This needs torch, which the project does not; run it in a separate venv and commit its output:

  python3.11 -m venv V && V/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
  V/bin/python tools/make_parity_fixtures.py
"""

import argparse
import dataclasses
import json
import os
import shutil
import zlib
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FIRST_TOKEN = 3  # special ids are skipped: torch gives a padding token's embedding no gradient


@dataclasses.dataclass(frozen=True)
class Variant:
  """One fixture.

  Attributes:
    published: The config.json, with the keys of the published file of the same name.
    length: Length T of the [2, T] tokens; not a multiple of any kernel's block size.
    form: "safetensors" or "bin" (torch.save's zip format).
    shards: Number of weight files; more than one adds an index.
    buffers: Whether to write rotary_emb.inv_freq too, as in files of 2023.
    modern: Whether transformers rewrites the config.json in its current spelling (rope_parameters,
      dtype).
  """

  published: dict[str, Any]
  length: int
  form: str = "safetensors"
  shards: int = 1
  buffers: bool = False
  modern: bool = False


_LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 24,
  "initializer_range": 0.02,
  "intermediate_size": 44,
  "max_position_embeddings": 64,
  "model_type": "llama",
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "rms_norm_eps": 1e-05,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
  "use_cache": True,
  "vocab_size": 89,
}
_LLAMA_2 = _LLAMA | {
  "num_key_value_heads": 4,
  "pretraining_tp": 1,
  "rope_scaling": None,
  "torch_dtype": "float16",
  "transformers_version": "4.31.0.dev0",
}
# OpenLLaMA's config has neither num_key_value_heads nor rope_theta, and its heads have 100
# dimensions (3B): neither a power of two nor a multiple of eight.
_OPEN_LLAMA = _LLAMA | {
  "hidden_size": 40,
  "pad_token_id": 0,
  "rms_norm_eps": 1e-06,
  "torch_dtype": "float16",
  "transformers_version": "4.30.0.dev0",
}
_TINY_LLAMA = _LLAMA | {
  "attention_bias": False,
  "hidden_size": 24,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "pretraining_tp": 1,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "transformers_version": "4.35.0",
}
_SMOLLM2 = _LLAMA | {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "eos_token_id": 0,
  "is_llama_config": True,
  "mlp_bias": False,
  "num_attention_heads": 3,
  "num_hidden_layers": 3,
  "num_key_value_heads": 1,
  "pretraining_tp": 1,
  "rope_interleaved": False,
  "rope_scaling": None,
  "rope_theta": 100000,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.40.1",
}
_MISTRAL = {
  "architectures": ["MistralForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "hidden_act": "silu",
  "hidden_size": 32,
  "initializer_range": 0.02,
  "intermediate_size": 36,
  "max_position_embeddings": 96,
  "model_type": "mistral",
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
  "sliding_window": 8,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.34.0.dev0",
  "use_cache": True,
  "vocab_size": 83,
}
# In Gemma's first files, "gelu" denotes its tanh approximation, head_dim is not D / N, and
# tie_word_embeddings is missing.
_GEMMA = {
  "architectures": ["GemmaForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 2,
  "eos_token_id": 1,
  "head_dim": 16,
  "hidden_act": "gelu",
  "hidden_size": 24,
  "initializer_range": 0.02,
  "intermediate_size": 40,
  "max_position_embeddings": 64,
  "model_type": "gemma",
  "num_attention_heads": 3,
  "num_hidden_layers": 2,
  "num_key_value_heads": 1,
  "pad_token_id": 0,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.38.0.dev0",
  "use_cache": True,
  "vocab_size": 101,
}
_PHI = {
  "architectures": ["PhiForCausalLM"],
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "embd_pdrop": 0.0,
  "eos_token_id": 0,
  "hidden_act": "gelu_new",
  "hidden_size": 40,
  "initializer_range": 0.02,
  "intermediate_size": 52,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 64,
  "model_type": "phi",
  "num_attention_heads": 2,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "partial_rotary_factor": 0.4,
  "qk_layernorm": False,
  "resid_pdrop": 0.1,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "float16",
  "transformers_version": "4.37.0",
  "use_cache": True,
  "vocab_size": 79,
}

# Llama 3.1 and 3.2: each frequency is scaled by its wavelength.
_LLAMA_3 = _LLAMA | {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "bos_token_id": 1,
  "eos_token_id": [2, 3, 4],
  "head_dim": 16,
  "hidden_size": 64,
  "mlp_bias": False,
  "num_key_value_heads": 2,
  "pretraining_tp": 1,
  "rope_scaling": {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.42.3",
}
_QWEN_2 = _LLAMA | {
  "architectures": ["Qwen2ForCausalLM"],
  "attention_dropout": 0.0,
  "hidden_size": 32,
  "max_window_layers": 2,
  "model_type": "qwen2",
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 64,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.40.1",
  "use_mrope": False,
  "use_sliding_window": False,
}
_QWEN_3 = _QWEN_2 | {
  "architectures": ["Qwen3ForCausalLM"],
  "attention_bias": False,
  "head_dim": 12,
  "model_type": "qwen3",
  "rope_scaling": None,
  "sliding_window": None,
  "tie_word_embeddings": False,
  "transformers_version": "4.51.0",
}
del _QWEN_3["use_mrope"]
_GEMMA_2 = _GEMMA | {
  "architectures": ["Gemma2ForCausalLM"],
  "attn_logit_softcapping": 5.0,
  "cache_implementation": "hybrid",
  "final_logit_softcapping": 3.0,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "model_type": "gemma2",
  "num_attention_heads": 4,
  "num_hidden_layers": 3,
  "num_key_value_heads": 2,
  "query_pre_attn_scalar": 24,
  "sliding_window": 8,
  "torch_dtype": "float32",
  "transformers_version": "4.42.0.dev0",
}
del _GEMMA_2["rope_scaling"]
_GEMMA_3 = _GEMMA_2 | {
  "architectures": ["Gemma3ForCausalLM"],
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "model_type": "gemma3_text",
  "num_hidden_layers": 8,
  "num_key_value_heads": 1,
  "rope_local_base_freq": 10000.0,
  "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
  "rope_theta": 1000000.0,
  "sliding_window_pattern": 6,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.50.0.dev0",
}
del _GEMMA_3["hidden_act"]
_PHI_3 = _LLAMA | {
  "architectures": ["Phi3ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "embd_pdrop": 0.0,
  "hidden_size": 32,
  "model_type": "phi3",
  "num_key_value_heads": 2,
  "original_max_position_embeddings": 64,
  "pad_token_id": 0,
  "resid_pdrop": 0.0,
  "rope_scaling": None,
  "rope_theta": 10000.0,
  "sliding_window": 11,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.40.2",
}
_LONGROPE = {  # factors of Phi-4-mini's shape: 1 for high frequencies, up to 40 for low ones
  "long_factor": [1, 1.25, 3.5, 40.5],
  "short_factor": [1, 1.0, 1.1, 1.25],
  "type": "longrope",
}
_PHI_3_LONG = _PHI_3 | {
  "original_max_position_embeddings": 16,
  "rope_scaling": _LONGROPE,
  "sliding_window": 262144,
}
_PHI_4_MINI = _PHI_3_LONG | {
  "full_attn_mod": 1,
  "interpolate_factor": 1,
  "lm_head_bias": False,
  "mlp_bias": False,
  "partial_rotary_factor": 0.75,
  "rope_scaling": {"long_factor": [1, 4.0, 9.5], "short_factor": [1.0] * 3, "type": "longrope"},
  "tie_word_embeddings": True,
}
_SMOLLM_3 = _LLAMA | {
  "architectures": ["SmolLM3ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "hidden_size": 32,
  "layer_types": ["full_attention"] * 5,
  "max_window_layers": 28,
  "mlp_bias": False,
  "model_type": "smollm3",
  "no_rope_layer_interval": 4,
  "no_rope_layers": [1, 1, 1, 0, 1],
  "num_hidden_layers": 5,
  "num_key_value_heads": 2,
  "pad_token_id": 0,
  "pretraining_tp": 2,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 5000000.0,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.54.0.dev0",
  "use_sliding_window": False,
}
_OLMO_2 = _LLAMA | {
  "architectures": ["Olmo2ForCausalLM"],
  "attention_bias": False,
  "attention_dropout": 0.0,
  "hidden_size": 32,
  "model_type": "olmo2",
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 500000,
  "torch_dtype": "float32",
  "transformers_version": "4.47.0.dev0",
}

VARIANTS = {
  "llama2": Variant(_LLAMA_2, length=21, buffers=True),
  "llama2_modern": Variant(_LLAMA_2 | {"torch_dtype": "float32"}, length=21, modern=True),
  "llama2_linear": Variant(  # like LongChat and Vicuna 16k: positions are divided by a factor
    _LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 4.0}}, length=27
  ),
  "tiny_llama": Variant(_TINY_LLAMA, length=26, shards=3),
  "open_llama": Variant(_OPEN_LLAMA, length=17, form="bin", buffers=True),
  "open_llama_sharded": Variant(_OPEN_LLAMA, length=17, form="bin", shards=2, buffers=True),
  "smollm2": Variant(_SMOLLM2, length=31),
  "mistral": Variant(_MISTRAL, length=29, shards=2),
  "mistral_wide_window": Variant(
    _MISTRAL | {"head_dim": 12, "hidden_size": 28, "sliding_window": 64, "torch_dtype": "float32"},
    length=29,
    modern=True,
  ),
  "mistral_no_window": Variant(  # like v0.2
    _MISTRAL | {"num_hidden_layers": 1, "rope_theta": 1e6, "sliding_window": None}, length=37
  ),
  "gemma_2b": Variant(_GEMMA, length=19, shards=2),
  "gemma_7b": Variant(
    _GEMMA | {"num_attention_heads": 2, "num_key_value_heads": 2, "torch_dtype": "float32"},
    length=23,
    modern=True,
  ),
  "phi_2": Variant(_PHI, length=13, shards=2),
  "phi_modern": Variant(
    _PHI
    | {
      "hidden_size": 20,
      "intermediate_size": 34,
      "num_hidden_layers": 3,
      "torch_dtype": "float32",
    },
    length=33,
    modern=True,
  ),
  "phi_linear": Variant(
    _PHI
    | {
      "num_hidden_layers": 1,
      "rope_scaling": {"type": "linear", "factor": 2.5},
      "torch_dtype": "float32",
    },
    length=25,
    modern=True,
  ),
  "llama3": Variant(_LLAMA_3, length=37),
  "llama3_modern": Variant(
    _LLAMA_3 | {"tie_word_embeddings": True, "torch_dtype": "float32"}, length=37, modern=True
  ),
  "llama_yarn": Variant(
    _LLAMA_3
    | {
      "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
      }
    },
    length=33,
  ),
  "qwen2": Variant(_QWEN_2, length=23),
  "qwen2_window": Variant(  # the last of three layers has a window
    _QWEN_2
    | {"num_hidden_layers": 3, "sliding_window": 8, "use_sliding_window": True}
    | {"tie_word_embeddings": False, "torch_dtype": "float32"},
    length=27,
    modern=True,
  ),
  "qwen3": Variant(_QWEN_3, length=22, shards=2),
  "qwen3_modern": Variant(_QWEN_3 | {"torch_dtype": "float32"}, length=22, modern=True),
  "gemma2": Variant(_GEMMA_2, length=29),
  "gemma2_modern": Variant(
    _GEMMA_2 | {"num_hidden_layers": 4, "sliding_window": 5}, length=21, modern=True
  ),
  "gemma3": Variant(_GEMMA_3, length=31),
  "gemma3_modern": Variant(
    _GEMMA_3
    | {"num_hidden_layers": 5, "rope_scaling": None, "sliding_window_pattern": 2}
    | {"torch_dtype": "float32"},
    length=26,
    modern=True,
  ),
  "phi3": Variant(_PHI_3, length=25, shards=2),
  "phi3_long": Variant(_PHI_3_LONG, length=29),
  "phi3_long_modern": Variant(_PHI_3_LONG | {"torch_dtype": "float32"}, length=29, modern=True),
  "phi4_mini": Variant(_PHI_4_MINI, length=30),
  "phi4_mini_short": Variant(_PHI_4_MINI, length=16),
  "smollm3": Variant(_SMOLLM_3, length=18),
  "smollm3_modern": Variant(_SMOLLM_3 | {"torch_dtype": "float32"}, length=24, modern=True),
  "olmo2": Variant(_OLMO_2, length=28),
  "olmo2_modern": Variant(
    _OLMO_2 | {"num_attention_heads": 2, "num_key_value_heads": 1}, length=19, modern=True
  ),
}


def random_tensor(name: str, shape: torch.Size, model_type: str, rng) -> torch.Tensor:
  """Samples a tensor such that attention is far from uniform and logits are of order one."""
  if "norm" in name and name.endswith(".weight"):
    center = 0.0 if model_type.startswith("gemma") else 1.0  # Gemma adds one to the weight
    values = center + rng.uniform(-0.5, 0.5, shape)
  elif name.endswith(".bias") or "embed_tokens" in name:
    values = rng.normal(0.0, 0.3, shape)
  else:
    values = rng.normal(0.0, 1.5 / shape[-1] ** 0.5, shape)
  return torch.from_numpy(values.astype(np.float32))


def write_checkpoint(name: str, variant: Variant, folder: str) -> None:
  """Writes config.json and the weight files of a variant."""
  with open(os.path.join(folder, "config.json"), "w") as file:
    json.dump(variant.published, file, indent=2)
    file.write("\n")
  config = transformers.AutoConfig.from_pretrained(folder)
  if variant.modern:
    config.save_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)

  rng = np.random.default_rng(zlib.crc32(name.encode()))
  dtype = _DTYPES[variant.published["torch_dtype"]]
  tensors = {}
  for key, parameter in model.named_parameters():  # a tied head appears once, as in published files
    tensors[key] = random_tensor(key, parameter.shape, config.model_type, rng).to(dtype)
  if variant.buffers:
    for layer in range(config.num_hidden_layers):
      key = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
      tensors[key] = model.model.rotary_emb.inv_freq.clone()
  write_weights(tensors, variant, folder)


def write_weights(tensors: dict[str, torch.Tensor], variant: Variant, folder: str) -> None:
  """Writes one weight file, or several with an index, under the names that transformers uses."""
  stem, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[
    variant.form
  ]
  names = list(tensors)
  weight_map = {}
  for shard in range(variant.shards):
    chosen = names[
      len(names) * shard // variant.shards : len(names) * (shard + 1) // variant.shards
    ]
    part = f"-{shard + 1:05d}-of-{variant.shards:05d}" if variant.shards > 1 else ""
    filename = f"{stem}{part}.{suffix}"
    weight_map |= dict.fromkeys(chosen, filename)
    path = os.path.join(folder, filename)
    if variant.form == "bin":
      torch.save({key: tensors[key] for key in chosen}, path)
    else:
      safetensors.torch.save_file({key: tensors[key] for key in chosen}, path, {"format": "pt"})
  if variant.shards > 1:
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    with open(os.path.join(folder, f"{stem}.{suffix}.index.json"), "w") as file:
      json.dump(index, file, indent=2)
      file.write("\n")


def write_expected(name: str, variant: Variant, folder: str) -> None:
  """Loads the checkpoint with transformers in float32 and writes its results."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  if info["missing_keys"] or info["mismatched_keys"]:
    raise ValueError(f"{name}: transformers did not load every tensor: {info}")
  model.eval()
  rng = np.random.default_rng(zlib.crc32(f"{name} tokens".encode()))
  tokens = rng.integers(_FIRST_TOKEN, model.config.vocab_size, (2, variant.length))
  logits = model(torch.from_numpy(tokens), use_cache=False).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten()
  )
  loss.backward()
  norms = {key: p.grad.double().norm().item() for key, p in model.named_parameters()}
  np.savez_compressed(
    os.path.join(folder, "expected.npz"),
    tokens=tokens.astype(np.int32),
    logits=logits.detach().numpy(),
    loss=np.float32(loss.item()),
    gradient_names=np.array(list(norms)),
    gradient_norms=np.array(list(norms.values()), np.float32),
  )


def main() -> None:
  """Writes the selected fixtures, replacing existing ones."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output_dir", default="tests/fixtures/parity")
  parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
  arguments = parser.parse_args()
  torch.use_deterministic_algorithms(True)
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  for name in arguments.only:
    folder = os.path.join(arguments.output_dir, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    write_checkpoint(name, VARIANTS[name], folder)
    write_expected(name, VARIANTS[name], folder)
    size = sum(entry.stat().st_size for entry in os.scandir(folder))
    print(f"{name}: {size / 1024:.0f} KB")


if __name__ == "__main__":
  main()
