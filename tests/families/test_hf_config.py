"""Reads config.json files in the published styles of 2023 and 2024."""

import math
import re

import pytest
from transformers import LlamaConfig

from ll3m import families
from ll3m.models import rope

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
GEMMA3 = GEMMA | {"model_type": "gemma3_text"}
QWEN = LLAMA | {"model_type": "qwen2"}
SMOLLM3 = LLAMA | {"model_type": "smollm3"}
PHI3 = LLAMA | {"model_type": "phi3"}


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


def test_frequencies_of_llama3_are_those_of_its_paper():
  """Values for theta 5e5, H = 128 in float64, by the formula of Llama 3.1's release."""
  config = families.get_preset("llama3.1_8b").config
  found = rope.inverse_frequencies(config, is_long=False)
  expected = []
  for i in range(64):
    frequency = 5e5 ** (-i / 64)
    wavelength = 2 * math.pi / frequency
    smooth = min(1, max(0, (8192 / wavelength - 1) / 3))
    expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
  assert found == pytest.approx(expected, rel=1e-6)
  assert found[0] == 1.0
  assert found[-1] == pytest.approx(5e5 ** (-63 / 64) / 8, rel=1e-6)


@pytest.mark.parametrize(
  ("changes", "types", "window"),
  [
    ({}, (), None),
    ({"use_sliding_window": True}, ("full",) * 2, None),  # 28 layers without a window
    ({"use_sliding_window": True, "max_window_layers": 0}, ("sliding",) * 2, 4096),
    (
      {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9},
      ("full", "sliding"),
      9,
    ),
    ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, (), None),
  ],
)
def test_reads_the_window_of_qwen(changes, types, window):
  config = read(QWEN, **changes)
  assert config.sliding_window == window
  assert config.all_layer_types == (types or ("full",) * 2)


def test_reads_the_layers_of_gemma_and_smollm():
  six = {"num_hidden_layers": 6}
  sliding, full = "sliding", "full"
  assert read(GEMMA3, **six).all_layer_types == (sliding,) * 5 + (full,)
  assert read(GEMMA3, **six, sliding_window_pattern=3).layer_types == (sliding, sliding, full)
  given = ["full_attention", *["sliding_attention"] * 5]
  assert read(GEMMA3, **six, layer_types=given).all_layer_types == (full,) + (sliding,) * 5
  assert read(SMOLLM3, **six).all_layer_types == ("full", "full", "full", "no_rope", "full", "full")
  assert read(SMOLLM3, **six, no_rope_layers=[0, 1] * 3).layer_types == ("no_rope", "full")


def test_a_llama_may_tie_its_embeddings():
  assert read(LLAMA, tie_word_embeddings=True).tie_embeddings


@pytest.mark.parametrize(
  ("hf", "message"),
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2'; expected one of llama, mistral, gemma, phi, "),
    ({"model_type": "qwen3_moe"}, "(did you mean 'qwen3'?)"),
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
    (LLAMA | {"rope_parameters": {"rope_type": "llama3"}}, "the type 'llama3' but no factor"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "the type 'yarn' but no factor"),
    (PHI3 | {"rope_scaling": {"type": "longrope"}}, "the type 'longrope' but no short_factor"),
    (
      PHI3 | {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
      "rope_short_factors must have 4 numbers for longrope scaling of 4 frequencies, got 1",
    ),
    (GEMMA3 | {"layer_types": ["full_attention"]}, "layer_types of config.json must list 2 layers"),
    (GEMMA3 | {"rope_parameters": {"rope_theta": 5e5}}, "must be an object for each type of layer"),
    (
      GEMMA3 | {"rope_parameters": {"full_attention": 5}},
      "full_attention in rope_parameters of co",
    ),
    (
      GEMMA3 | {"rope_parameters": {"sliding_attention": [1]}},
      "must be an object or null, got [1]",
    ),
    (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern of config.json must be posit"),
    (QWEN | {"max_window_layers": "all"}, "max_window_layers of config.json must be a whole numb"),
    (SMOLLM3 | {"no_rope_layers": [1]}, "no_rope_layers of config.json must list 0 or 1 for 2 la"),
    (
      QWEN | {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
      "sliding_window must be positive, got 0",
    ),
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
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    (
      LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
      "mscale=0.7, unknown to LL3M",
    ),
    (
      LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
      "truncate=False, unknown to LL3M",
    ),
    (LLAMA | {"rope_scaling": {"type": "su"}}, "type 'su'"),
    (LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "type 'mrope'"),
    (LLAMA | {"rope_scaling": {"type": ["linear"]}}, "type ['linear']"),
    (LLAMA | {"rope_scaling": {"factor": 2.0}}, "factor=2.0 but no type"),
    (LLAMA | {"rope_parameters": {"rope_type": "default", "factor": 2}}, "factor=2 but no type"),
    (
      LLAMA
      | {
        "rope_parameters": {
          "full_attention": {"rope_theta": 1e4},
          "sliding_attention": {"rope_theta": 1e5},
        }
      },
      "different parameters for types of layers",
    ),
    (
      GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
      "scales the rotary embedding of layers with a window",
    ),
    (
      GEMMA3
      | {
        "rope_parameters": {
          "sliding_attention": {
            "rope_type": "longrope",
            "short_factor": [1.0],
            "long_factor": [1.0],
          }
        }
      },
      "scales the rotary embedding of layers with a window",
    ),
    (GEMMA3 | {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    (QWEN | {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    (
      SMOLLM3
      | {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0]}
      | {"layer_types": ["full_attention", "sliding_attention"]},
      "layers with a window but without a rotary embedding",
    ),
    (PHI3 | {"attention_bias": True}, "attention_bias=True"),
    (QWEN | {"use_mrope": True}, "use_mrope=True"),
    (LLAMA | {"num_local_experts": 8}, "num_local_experts=8"),
    (LLAMA | {"attention_chunk_size": 8192}, "attention_chunk_size=8192"),
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
