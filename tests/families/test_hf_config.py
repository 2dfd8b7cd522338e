"""Reads config.json files in the published styles of 2023 and 2024."""

import re

import pytest
from transformers import LlamaConfig

from ll3m import families

LLAMA = {
  "model_type": "llama",
  "hidden_act": "silu",
  "hidden_size": 48,
  "intermediate_size": 96,
  "max_position_embeddings": 64,
  "num_attention_heads": 6,
  "num_hidden_layers": 2,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "vocab_size": 100,
}
MISTRAL = LLAMA | {"model_type": "mistral"}
GEMMA = LLAMA | {"model_type": "gemma", "head_dim": 16, "hidden_act": "gelu"}
PHI = {
  "model_type": "phi",
  "hidden_act": "gelu_new",
  "hidden_size": 72,
  "intermediate_size": 96,
  "layer_norm_eps": 1e-5,
  "max_position_embeddings": 64,
  "num_attention_heads": 6,
  "num_hidden_layers": 2,
  "vocab_size": 100,
}


def read(hf, **changes):
  return families.from_hf_config(hf | changes).config


def without(hf, *names):
  return {key: value for key, value in hf.items() if key not in names}


def test_missing_keys_have_the_defaults_of_transformers():
  llama = read(without(LLAMA, "num_key_value_heads", "rms_norm_eps"))
  assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta) == (6, 8, 1e4)
  assert (llama.norm_epsilon, llama.tie_embeddings) == (1e-6, False)
  assert read(MISTRAL).sliding_window == 4096
  gemma = read(without(GEMMA, "head_dim"))
  assert (gemma.head_dim, gemma.tie_embeddings, gemma.scale_embeddings) == (256, True, True)
  phi = read(PHI)
  assert (phi.rotary_fraction, phi.num_kv_heads, phi.norm, phi.use_bias) == (0.5, 6, "layer", True)


@pytest.mark.parametrize(
  ("window", "expected"), [({"sliding_window": None}, None), ({"sliding_window": 7}, 7)]
)
def test_a_null_window_disables_the_window(window, expected):
  assert read(MISTRAL, **window).sliding_window == expected


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_theta": 1e6},
    {"rope_theta": 1e6, "rope_scaling": None},
    {"rope_theta": 1_000_000, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
  ],
)
def test_reads_rope_theta_in_every_style(rope):
  assert read(LLAMA, **rope).rope_theta == 1e6


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    {"rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}},
    {
      "rope_theta": 1e4,
      "rope_scaling": {"type": "linear", "factor": 4.0},
      "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
  ],
)
def test_reads_linear_scaling_in_every_style(rope):
  """transformers reads the same parameters from the file and from the exported config."""
  config = read(LLAMA, **rope)
  assert config.rope_scaling_factor == 4.0
  written = families.FAMILIES["llama"].to_hf_config(config)
  assert families.from_hf_config(written).config == config
  expected = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
  for file in (LLAMA | rope, written):
    parameters = LlamaConfig(**file).rope_parameters
    assert {key: parameters[key] for key in expected} == expected


def test_a_factor_of_one_disables_scaling():
  for parameters in ({"type": "linear", "factor": 1.0}, {"factor": 1.0}, {}):
    assert read(LLAMA, rope_scaling=parameters).rope_scaling_factor == 1.0


@pytest.mark.parametrize(
  "rope",
  [
    {"partial_rotary_factor": 0.4},
    {"rope_parameters": {"partial_rotary_factor": 0.4, "rope_type": "default"}},
  ],
)
def test_reads_partial_rotary_in_every_style(rope):
  config = read(PHI, **rope)
  assert (config.rotary_fraction, config.rotary_dim) == (0.4, 4)


@pytest.mark.parametrize(
  "activation",
  [
    {"hidden_act": "gelu"},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "gelu", "hidden_activation": None},
    {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
  ],
)
def test_gemmas_gelu_is_its_tanh_approximation(activation):
  assert read(GEMMA, **activation).activation == "gelu_tanh"


def test_phis_gelu_is_exact():
  assert read(PHI).activation == "gelu_tanh"
  assert read(PHI, hidden_act="gelu").activation == "gelu"


def test_a_llama_may_tie_its_embeddings():
  assert read(LLAMA, tie_word_embeddings=True).tie_embeddings


@pytest.mark.parametrize(
  ("hf", "message"),
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2'; expected one of llama, mistral, gemma, phi"),
    ({}, "model_type None"),
    (without(LLAMA, "vocab_size"), "config.json of a llama model lacks 'vocab_size'"),
    (LLAMA | {"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 6"),
    (LLAMA | {"num_key_value_heads": 4}, "multiple of num_kv_heads (4)"),
    (LLAMA | {"num_hidden_layers": "2"}, "num_hidden_layers of config.json must be int, got '2'"),
    (LLAMA | {"hidden_size": "48"}, "hidden_size of config.json must be int, got '48'"),
    (LLAMA | {"num_attention_heads": 0}, "is not a multiple of num_attention_heads 0"),
    (LLAMA | {"rms_norm_eps": float("nan")}, "norm_epsilon must be finite, got nan"),
    (LLAMA | {"rope_theta": "big"}, "rope_theta of config.json must be float, got 'big'"),
    (LLAMA | {"rope_scaling": "linear"}, "rope_scaling of config.json must be an object or null"),
    (LLAMA | {"rope_parameters": [2.0]}, "rope_parameters of config.json must be an object"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "the type 'linear' but no factor"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": "4"}}, "must be float, got '4'"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be at least 1, got 0.5"),
    (
      LLAMA | {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
      "rope_type='default' and type='linear', which contradict each other",
    ),
    (
      LLAMA
      | {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
      },
      "which contradict each other",
    ),
    (GEMMA | {"hidden_activation": "gelu", "hidden_act": ["gelu"]}, "hidden_act=['gelu'], which"),
    (
      PHI | {"hidden_activation": "gelu"},
      "hidden_activation='gelu' and hidden_act='gelu_new', which contradict each other",
    ),
  ],
)
def test_rejects_invalid_configs(hf, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    families.from_hf_config(hf)


@pytest.mark.parametrize(
  ("hf", "message"),
  [
    (LLAMA | {"attention_bias": True}, "attention_bias=True"),
    (LLAMA | {"mlp_bias": True}, "mlp_bias=True"),
    (LLAMA | {"hidden_act": "relu"}, "the activation 'relu'"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (PHI | {"qk_layernorm": True}, "qk_layernorm=True"),
    (LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "type 'llama3'"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type 'yarn'"),
    (LLAMA | {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "type 'su'"),
    (LLAMA | {"rope_scaling": {"rope_type": "longrope"}}, "type 'longrope'"),
    (LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "type 'mrope'"),
    (LLAMA | {"rope_scaling": {"type": ["linear"]}}, "type ['linear']"),
    (LLAMA | {"rope_scaling": {"factor": 2.0}}, "factor=2.0 but no type"),
    (LLAMA | {"rope_parameters": {"rope_type": "default", "factor": 2}}, "factor=2 but no type"),
    (
      LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
      "full_attention={'rope_type': 'default'}, unknown to LL3M",
    ),
    (
      LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 0.9}},
      "attention_factor=0.9, unknown to LL3M",
    ),
    (
      LLAMA | {"architectures": ["LlamaForSequenceClassification"]},
      "architectures=['LlamaForSequenceClassification']; llama models support only LlamaForCausal",
    ),
  ],
)
def test_rejects_features_that_the_decoder_does_not_support(hf, message):
  with pytest.raises(NotImplementedError, match=re.escape(message)):
    families.from_hf_config(hf)


@pytest.mark.parametrize(
  ("preset", "changes", "message"),
  [
    ("llama2_7b", {"use_bias": True}, "express use_bias=True; it implies False"),
    ("llama2_7b", {"sliding_window": 9}, "sliding_window=9; it implies None"),
    ("llama2_7b", {"rotary_fraction": 0.5}, "rotary_fraction=0.5; it implies 1.0"),
    ("llama2_7b", {"activation": "gelu"}, "a llama model cannot have activation='gelu'"),
    ("gemma_2b", {"norm_scale_offset": 0.0}, "norm_scale_offset=0.0; it implies 1.0"),
    ("phi_2", {"norm": "rms"}, "norm='rms'; it implies 'layer'"),
    ("phi_2", {"head_dim": 60}, "head_dim = d_model / num_heads (2560 / 32)"),
    ("phi_2", {"num_heads": 48, "num_kv_heads": 48}, "(2560 / 48)"),
  ],
)
def test_rejects_configs_that_config_json_cannot_express(preset, changes, message):
  family, config = families.get_preset(preset)
  with pytest.raises(ValueError, match=re.escape(message)):
    family.to_hf_config(config.replace(**changes))
