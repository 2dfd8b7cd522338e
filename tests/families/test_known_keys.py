"""Every key of a config.json is used, known to be irrelevant, or rejected by name.

Oracles: the fields of transformers' own configurations, and published config.json files.
"""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
from transformers import (
  AutoConfig,
  GemmaConfig,
  GenerationConfig,
  LlamaConfig,
  MistralConfig,
  PhiConfig,
  PreTrainedConfig,
)

from ll3m import families
from ll3m.families import known_keys, rope
from tests.families.test_hf_config import GEMMA, LLAMA, MISTRAL, PHI, read, without

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "gemma": GemmaConfig, "phi": PhiConfig}
PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
FILES = {"llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "phi": PHI}


@pytest.mark.parametrize("name", CLASSES)
def test_reads_configs_written_by_transformers(name):
  """They contain all fields of the family's class with their default values."""
  written = CLASSES[name](**FILES[name]).to_dict()
  fields = {field.name for field in dataclasses.fields(CLASSES[name])}
  assert fields <= written.keys() | {"torch_dtype"}
  assert read(json.loads(json.dumps(written))) == read(FILES[name])


@pytest.mark.parametrize("name", sorted(path.name for path in PARITY.iterdir()))
def test_transformers_reads_and_writes_the_same_model(name):
  """Both spellings of every fixture: the file's, and the one that transformers writes."""
  file = json.loads((PARITY / name / "config.json").read_text())
  family, config = families.from_hf_config(file)
  written = AutoConfig.for_model(**file).to_dict()
  assert read(json.loads(json.dumps(written))) == config
  exported = AutoConfig.for_model(**json.loads(json.dumps(family.to_hf_config(config)))).to_dict()
  assert read(json.loads(json.dumps(exported))) == config
  assert _plain(exported["rope_parameters"]) == _plain(written["rope_parameters"])


def _plain(parameters):
  """Returns rotary parameters without `type`, the name of rope_type before 2024, and defaults."""
  return {
    key: _plain(value) if isinstance(value, dict) else value
    for key, value in parameters.items()
    if key != "type" and (key, value) not in (("beta_fast", 32.0), ("beta_slow", 1.0))
  }


@pytest.mark.parametrize("name", CLASSES)
def test_ignores_irrelevant_settings(name):
  hf = FILES[name]
  common = {f.name: "?" for f in dataclasses.fields(PreTrainedConfig)}
  settings = GenerationConfig(
    temperature=0.3, top_p=0.9, do_sample=True, max_length=99, eos_token_id=[1, 2]
  ).to_dict()
  older = {
    "_name_or_path": "a/b", "torch_dtype": "bfloat16", "torchscript": False, "pretraining_tp": 2,
    "auto_map": {"AutoConfig": "a.B"}, "unsloth_fixed": True, "_attn_implementation": "sdpa",
    "id2label": {"0": "x"}, "num_labels": 1, "task_specific_params": {"a": 1}, "is_decoder": True,
    "attention_dropout": 0.1, "use_return_dict": True, "max_sequence_length": 2048,
    "image_token_id": 3, "initializer_range": 0.5,
  }  # fmt: skip
  own = {key: hf[key] for key in hf} | {"architectures": None, "is_encoder_decoder": False}
  assert read(common | settings | older | own) == read(hf)


PUBLISHED = {  # files from the Hub, with smaller sizes
  "TinyLlama": LLAMA
  | {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
    "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "float32",
    "tie_word_embeddings": False, "transformers_version": "4.35.0", "use_cache": True,
  },
  "decapoda": LLAMA
  | {
    "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1,
    "max_sequence_length": 2048, "pad_token_id": -1, "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
  },
  "SmolLM2": LLAMA
  | {
    "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "mlp_bias": False,
  },
  "zephyr": MISTRAL
  | {"sliding_window": 9, "_flash_attn_2_enabled": True, "attention_dropout": 0.0},
  "gemma": GEMMA | {"hidden_activation": "gelu_pytorch_tanh", "rope_scaling": None},
  "phi-2": PHI
  | {
    "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.1, "partial_rotary_factor": 0.4,
    "auto_map": {"AutoConfig": "configuration_phi.PhiConfig"}, "qk_layernorm": False,
  },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_reads_published_files(name):
  assert read(PUBLISHED[name]).vocab_size == 100


@pytest.mark.parametrize(
  ("hf", "neutral", "others"),
  [
    (LLAMA, {"is_causal": True}, [{"is_causal": False}]),
    (GEMMA, {"use_bidirectional_attention": False}, [{"use_bidirectional_attention": True},
     {"use_bidirectional_attention": "all"}]),
    (LLAMA, {"is_encoder_decoder": False}, [{"is_encoder_decoder": True}]),
    (LLAMA, {"add_cross_attention": False}, [{"add_cross_attention": True}]),
    (LLAMA, {"pruned_heads": {}}, [{"pruned_heads": {"0": [1]}}]),
    (MISTRAL, {"attention_bias": False}, [{"attention_bias": True}]),
    (PHI, {"attention_bias": True, "use_bias": True}, [{"mlp_bias": False}]),
    (PHI, {"head_dim": 12}, [{"head_dim": 16}]),
    (LLAMA, {"sliding_window": None}, [{"sliding_window": 4096}]),
    (LLAMA, {"use_sliding_window": False}, [{"use_sliding_window": True}]),
    (MISTRAL, {"use_sliding_window": True}, [{"use_sliding_window": False}]),
    (LLAMA, {"max_window_layers": 1}, []),
    (MISTRAL | {"sliding_window": None}, {"max_window_layers": 1}, []),
    (MISTRAL, {}, [{"max_window_layers": 1}]),
    (LLAMA, {"layer_types": ["full_attention"] * 2},
     [{"layer_types": ["full_attention", "sliding_attention"]}, {"layer_types": []}]),
    (MISTRAL, {"layer_types": ["sliding_attention"] * 2},
     [{"layer_types": ["full_attention"] * 2}]),
    (LLAMA, {"no_rope_layers": [1, 1]}, [{"no_rope_layers": [1, 0]}]),
    (LLAMA, {"rope_interleaved": False}, [{"rope_interleaved": True}]),
    (GEMMA, {"attn_logit_softcapping": None}, [{"attn_logit_softcapping": 50.0}]),
    (GEMMA, {"final_logit_softcapping": None}, [{"final_logit_softcapping": 30.0}]),
    (GEMMA, {"query_pre_attn_scalar": 16}, [{"query_pre_attn_scalar": 144}]),
    (LLAMA, {"attention_multiplier": 8**-0.5}, [{"attention_multiplier": 0.1}]),
    (LLAMA, {"embedding_multiplier": 1.0}, [{"embedding_multiplier": 12.0}]),
    (LLAMA, {"residual_multiplier": 1.0}, [{"residual_multiplier": 0.2}]),
    (LLAMA, {"logit_scale": 1.0}, [{"logit_scale": 0.06}]),
    (LLAMA, {"logits_scaling": 1}, [{"logits_scaling": 8.0}]),
    (LLAMA, {"num_local_experts": 0, "num_experts_per_tok": 0}, [{"num_local_experts": 8}]),
    (LLAMA, {"clip_qkv": None}, [{"clip_qkv": 8.0}]),
  ],
)  # fmt: skip
def test_rejects_relevant_settings_unless_neutral(hf, neutral, others):
  assert read(hf, **neutral) == read(hf)
  for other in others:
    ((key, value),) = other.items()
    with pytest.raises(NotImplementedError, match=re.escape(f"config.json has {key}={value!r}")):
      families.from_hf_config(hf | other)


@pytest.mark.parametrize("name", FILES)
def test_rejects_unknown_keys(name):
  strange = {"mystery_scale": 2.0, "per_layer_config": {"0": {}}, "rms_norm_epsilon": 1e-3}
  with pytest.raises(NotImplementedError) as error:
    families.from_hf_config(FILES[name] | strange)
  for part in ("mystery_scale=2.0", "per_layer_config={'0': {}}", "rms_norm_epsilon=0.001",
               "unknown to LL3M", "if not, remove them from config.json"):  # fmt: skip
    assert part in str(error.value)
  assert read(FILES[name], mystery_scale=None) == read(FILES[name])


def test_a_misspelt_key_gets_a_suggestion():
  with pytest.raises(NotImplementedError, match=r"did you mean 'rms_norm_eps'\?"):
    families.from_hf_config(without(LLAMA, "rms_norm_eps") | {"rms_norm_epsilon": 1e-5})


@pytest.mark.parametrize(
  ("settings", "method"),
  [
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "'fp8'"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
    ({"quantization_config": {"load_in_8bit": True}}, "'bitsandbytes'"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "not named; it has bits, group_size"),
    ({"compression_config": {"format": "int-quantized"}}, "not named; it has format"),
    ({"quantization_config": "int8"}, "'int8'"),
  ],
)
def test_reports_the_quantisation_method(settings, method):
  (key,) = settings
  part = re.escape(f"config.json has a {key} (quant_method {method})")
  with pytest.raises(NotImplementedError, match=f"{part}.*convert the unquantised"):
    families.from_hf_config(LLAMA | settings)


@pytest.mark.parametrize("value", [None, {}])
def test_ignores_an_empty_quantisation_config(value):
  assert read(LLAMA, quantization_config=value) == read(LLAMA)


ANYTHING = (
  None, True, False, 0, 1, -1, 2.5, float("inf"), float("nan"), 10**400, "x", "linear", [], [1],
  ["full_attention"] * 2, {}, {"type": "linear", "factor": 2}, {"type": {}}, {"factor": None},
  {"rope_type": "linear", "factor": []}, {"rope_theta": "x"}, {"a": {"b": 1}}, [None],
)  # fmt: skip


def test_any_value_of_any_key_is_read_or_rejected_in_one_sentence():
  draw = random.Random(0)
  keys = sorted({*known_keys._NEUTRAL, *rope.KEYS, *LLAMA, *GEMMA, *PHI, "architectures"})
  outcomes = {True: 0, False: 0}
  for _ in range(5000):
    changes = {draw.choice(keys): draw.choice(ANYTHING) for _ in range(draw.randint(1, 3))}
    try:
      families.from_hf_config(draw.choice(list(FILES.values())) | changes)
      outcomes[True] += 1
    except (ValueError, NotImplementedError) as error:
      assert len(str(error)) < 1000 and "\n" not in str(error)
      outcomes[False] += 1
  assert min(outcomes.values()) > 100
