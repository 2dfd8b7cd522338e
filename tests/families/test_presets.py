import json
import math

import jax
import pytest

from ll3m import families
from ll3m.data.config import TOKENIZER_NAMES
from ll3m.families import tensor_rules
from ll3m.models.transformer import make_model

# Parameter counts of the published checkpoints; a tied head is counted once.
COUNTS = {
  "llama2_7b": 6_738_415_616,
  "llama2_13b": 13_015_864_320,
  "llama2_70b": 68_976_648_192,
  "mistral_7b": 7_241_732_096,
  "open_llama_3b": 3_426_473_600,
  "open_llama_7b": 6_738_415_616,
  "tiny_llama_1b": 1_100_048_384,
  "gemma_2b": 2_506_172_416,
  "gemma_7b": 8_537_680_896,
  "phi_2": 2_779_683_840,
  "smollm2_135m": 134_515_008,
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3.1_8b": 8_030_261_248,
  "llama3.1_70b": 70_553_706_496,
  "llama3.2_1b": 1_235_814_400,
  "llama3.2_3b": 3_212_749_824,
  "llama3.3_70b": 70_553_706_496,
  "mistral_7b_v0.3": 7_248_023_552,
  "mistral_nemo_12b": 12_247_782_400,
  "qwen2.5_0.5b": 494_032_768,
  "qwen2.5_1.5b": 1_543_714_304,
  "qwen2.5_3b": 3_085_938_688,
  "qwen2.5_7b": 7_615_616_512,
  "qwen2.5_14b": 14_770_033_664,
  "qwen2.5_32b": 32_763_876_352,
  "qwen2.5_72b": 72_706_203_648,
  "qwen3_0.6b": 596_049_920,
  "qwen3_1.7b": 1_720_574_976,
  "qwen3_4b": 4_022_468_096,
  "qwen3_8b": 8_190_735_360,
  "qwen3_14b": 14_768_307_200,
  "qwen3_32b": 32_762_123_264,
  "gemma2_2b": 2_614_341_888,
  "gemma2_9b": 9_241_705_984,
  "gemma2_27b": 27_227_128_320,
  "gemma3_270m": 268_098_176,
  "gemma3_1b": 999_885_952,
  "gemma3_4b": 3_880_263_168,
  "gemma3_12b": 11_766_034_176,
  "gemma3_27b": 27_009_346_304,
  "phi3_mini": 3_821_079_552,
  "phi3.5_mini": 3_821_079_552,
  "phi4": 14_659_507_200,
  "phi4_mini": 3_836_021_760,
  "smollm3_3b": 3_075_098_624,
  "olmo2_1b": 1_484_916_736,
  "olmo2_7b": 7_298_617_344,
  "olmo2_13b": 13_716_198_400,
}
ALIASES = {
  "llama_7b": "llama2_7b",
  "llama_13b": "llama2_13b",
  "llama_70b": "llama2_70b",
  "meta-llama/Llama-2-7b-hf": "llama2_7b",
  "meta-llama/Meta-Llama-3-8B": "llama3_8b",
  "meta-llama/Llama-3.1-8B-Instruct": "llama3.1_8b",
  "meta-llama/Llama-3.2-1B": "llama3.2_1b",
  "meta-llama/Llama-3.3-70B-Instruct": "llama3.3_70b",
  "Llama-3.2-1B": "llama3.2_1b",
  "mistralai/Mistral-7B-Instruct-v0.3": "mistral_7b_v0.3",
  "mistralai/Mistral-Nemo-Base-2407": "mistral_nemo_12b",
  "Qwen/Qwen2.5-0.5B": "qwen2.5_0.5b",
  "Qwen/Qwen2.5-7B-Instruct": "qwen2.5_7b",
  "Qwen/Qwen3-8B": "qwen3_8b",
  "qwen/qwen3-0.6b-base": "qwen3_0.6b",
  "google/gemma-2b": "gemma_2b",
  "google/gemma-2-9b-it": "gemma2_9b",
  "google/gemma-3-270m": "gemma3_270m",
  "google/gemma-3-4b-it": "gemma3_4b",
  "microsoft/phi-2": "phi_2",
  "microsoft/Phi-3-mini-4k-instruct": "phi3_mini",
  "microsoft/phi-4": "phi4",
  "microsoft/Phi-4-mini-instruct": "phi4_mini",
  "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2_135m",
  "HuggingFaceTB/SmolLM3-3B": "smollm3_3b",
  "allenai/OLMo-2-1124-7B": "olmo2_7b",
  "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tiny_llama_1b",
}

# (D, F, L, N, K, H, max positions, epsilon, V)
DIMENSIONS = {
  "llama2_7b": (4096, 11008, 32, 32, 32, 128, 4096, 1e-5, 32000),
  "llama2_13b": (5120, 13824, 40, 40, 40, 128, 4096, 1e-5, 32000),
  "llama2_70b": (8192, 28672, 80, 64, 8, 128, 4096, 1e-5, 32000),
  "mistral_7b": (4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 32000),
  "open_llama_3b": (3200, 8640, 26, 32, 32, 100, 2048, 1e-6, 32000),
  "open_llama_7b": (4096, 11008, 32, 32, 32, 128, 2048, 1e-6, 32000),
  "tiny_llama_1b": (2048, 5632, 22, 32, 4, 64, 2048, 1e-5, 32000),
  "gemma_2b": (2048, 16384, 18, 8, 1, 256, 8192, 1e-6, 256000),
  "gemma_7b": (3072, 24576, 28, 16, 16, 256, 8192, 1e-6, 256000),
  "phi_2": (2560, 10240, 32, 32, 32, 80, 2048, 1e-5, 51200),
  "smollm2_135m": (576, 1536, 30, 9, 3, 64, 8192, 1e-5, 49152),
  "llama3_8b": (4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 128256),
  "llama3.1_8b": (4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 128256),
  "llama3_70b": (8192, 28672, 80, 64, 8, 128, 8192, 1e-5, 128256),
  "llama3.1_70b": (8192, 28672, 80, 64, 8, 128, 131072, 1e-5, 128256),
  "llama3.3_70b": (8192, 28672, 80, 64, 8, 128, 131072, 1e-5, 128256),
  "llama3.2_1b": (2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 128256),
  "llama3.2_3b": (3072, 8192, 28, 24, 8, 128, 131072, 1e-5, 128256),
  "mistral_7b_v0.3": (4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 32768),
  "mistral_nemo_12b": (5120, 14336, 40, 32, 8, 128, 131072, 1e-5, 131072),
  "qwen2.5_0.5b": (896, 4864, 24, 14, 2, 64, 32768, 1e-6, 151936),
  "qwen2.5_1.5b": (1536, 8960, 28, 12, 2, 128, 131072, 1e-6, 151936),
  "qwen2.5_3b": (2048, 11008, 36, 16, 2, 128, 32768, 1e-6, 151936),
  "qwen2.5_7b": (3584, 18944, 28, 28, 4, 128, 131072, 1e-6, 152064),
  "qwen2.5_14b": (5120, 13824, 48, 40, 8, 128, 131072, 1e-6, 152064),
  "qwen2.5_32b": (5120, 27648, 64, 40, 8, 128, 131072, 1e-6, 152064),
  "qwen2.5_72b": (8192, 29568, 80, 64, 8, 128, 131072, 1e-6, 152064),
  "qwen3_0.6b": (1024, 3072, 28, 16, 8, 128, 40960, 1e-6, 151936),
  "qwen3_1.7b": (2048, 6144, 28, 16, 8, 128, 40960, 1e-6, 151936),
  "qwen3_4b": (2560, 9728, 36, 32, 8, 128, 40960, 1e-6, 151936),
  "qwen3_8b": (4096, 12288, 36, 32, 8, 128, 40960, 1e-6, 151936),
  "qwen3_14b": (5120, 17408, 40, 40, 8, 128, 40960, 1e-6, 151936),
  "qwen3_32b": (5120, 25600, 64, 64, 8, 128, 40960, 1e-6, 151936),
  "gemma2_2b": (2304, 9216, 26, 8, 4, 256, 8192, 1e-6, 256000),
  "gemma2_9b": (3584, 14336, 42, 16, 8, 256, 8192, 1e-6, 256000),
  "gemma2_27b": (4608, 36864, 46, 32, 16, 128, 8192, 1e-6, 256000),
  "gemma3_270m": (640, 2048, 18, 4, 1, 256, 32768, 1e-6, 262144),
  "gemma3_1b": (1152, 6912, 26, 4, 1, 256, 32768, 1e-6, 262144),
  "gemma3_4b": (2560, 10240, 34, 8, 4, 256, 131072, 1e-6, 262208),
  "gemma3_12b": (3840, 15360, 48, 16, 8, 256, 131072, 1e-6, 262208),
  "gemma3_27b": (5376, 21504, 62, 32, 16, 128, 131072, 1e-6, 262208),
  "phi3_mini": (3072, 8192, 32, 32, 32, 96, 4096, 1e-5, 32064),
  "phi3.5_mini": (3072, 8192, 32, 32, 32, 96, 131072, 1e-5, 32064),
  "phi4": (5120, 17920, 40, 40, 10, 128, 16384, 1e-5, 100352),
  "phi4_mini": (3072, 8192, 32, 24, 8, 128, 131072, 1e-5, 200064),
  "smollm3_3b": (2048, 11008, 36, 16, 4, 128, 65536, 1e-6, 128256),
  "olmo2_1b": (2048, 8192, 16, 16, 16, 128, 4096, 1e-6, 100352),
  "olmo2_7b": (4096, 11008, 32, 32, 32, 128, 4096, 1e-6, 100352),
  "olmo2_13b": (5120, 13824, 40, 40, 40, 128, 4096, 1e-6, 100352),
}


def abstract_shapes(config):
  shapes = jax.eval_shape(make_model(config).init, jax.random.key(0))
  return {
    f"{module}/{name}": leaf.shape
    for module, leaves in shapes.items()
    for name, leaf in leaves.items()
  }


def test_every_family_is_the_name_of_a_tokenizer():
  assert set(TOKENIZER_NAMES) == set(families.FAMILIES)


def test_every_preset_is_in_the_tables():
  assert set(families.PRESETS) == set(COUNTS) == set(DIMENSIONS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_match_the_published_models(name):
  family, config = families.get_preset(name)
  shapes = abstract_shapes(config)
  assert sum(map(math.prod, shapes.values())) == COUNTS[name]
  assert shapes == tensor_rules.parameter_shapes(family.rules, config)


@pytest.mark.parametrize("name", DIMENSIONS)
def test_dimensions_match_the_published_models(name):
  config = families.get_preset(name).config
  assert DIMENSIONS[name] == (
    config.d_model,
    config.d_ff,
    config.num_layers,
    config.num_heads,
    config.num_kv_heads,
    config.head_dim,
    config.max_positions,
    config.norm_epsilon,
    config.vocab_size,
  )


def test_switches_match_the_published_models():
  configs = {name: preset.config for name, preset in families.PRESETS.items()}
  gemmas = {n for n in configs if n.startswith("gemma")}
  gemmas_2 = {n for n in configs if n.startswith("gemma2")}
  gemmas_3 = {n for n in configs if n.startswith("gemma3")}
  olmos = {n for n in configs if n.startswith("olmo")}
  assert {n for n, c in configs.items() if c.tie_embeddings} == gemmas | {
    "smollm2_135m", "llama3.2_1b", "llama3.2_3b", "qwen2.5_0.5b", "qwen2.5_1.5b", "qwen2.5_3b",
    "qwen3_0.6b", "qwen3_1.7b", "qwen3_4b", "phi4_mini", "smollm3_3b",
  }  # fmt: skip
  assert {n for n, c in configs.items() if c.scale_embeddings} == gemmas
  assert {n for n, c in configs.items() if c.norm_scale_offset == 1} == gemmas
  assert {n for n, c in configs.items() if c.norm_position == "both"} == gemmas_2 | gemmas_3
  assert {n for n, c in configs.items() if c.norm_position == "after"} == olmos
  assert {n for n, c in configs.items() if c.qk_norm == "all_heads"} == olmos
  qwens_3 = {n for n in configs if n.startswith("qwen3")}
  assert {n for n, c in configs.items() if c.qk_norm == "per_head"} == qwens_3 | gemmas_3
  assert {n for n, c in configs.items() if c.qkv_bias} == {n for n in configs if "qwen2.5" in n}
  assert {n: c.activation for n, c in configs.items() if c.activation != "silu"} == {
    n: "gelu_tanh" for n in gemmas | {"phi_2"}
  }
  caps = {n: (c.attention_soft_cap, c.final_soft_cap) for n, c in configs.items()}
  assert {n for n, pair in caps.items() if pair == (50.0, 30.0)} == gemmas_2
  assert {n for n, pair in caps.items() if pair != (None, None)} == gemmas_2
  scalars = {n: c.query_pre_attn_scalar for n, c in configs.items() if c.query_pre_attn_scalar}
  assert scalars.keys() == gemmas_2 | gemmas_3
  assert {n: s for n, s in scalars.items() if s != 256} == {"gemma2_27b": 144, "gemma3_27b": 168}
  assert {n: c.sliding_window for n, c in configs.items() if c.sliding_window} == {
    "mistral_7b": 4096, "phi3_mini": 2047, "phi3.5_mini": 262_144, "phi4_mini": 262_144,
    **dict.fromkeys(gemmas_2, 4096), **dict.fromkeys(gemmas_3, 1024),
    "gemma3_270m": 512, "gemma3_1b": 512,
  }  # fmt: skip
  for name, config in configs.items():
    types = config.all_layer_types
    windowed = [i for i, kind in enumerate(config.layer_kinds) if kind.window]
    if name in gemmas_2:
      assert windowed == list(range(0, config.num_layers, 2))
    elif name in gemmas_3:
      assert windowed == [i for i in range(config.num_layers) if (i + 1) % 6]
      assert [k.rope for k in config.layer_kinds[:6]] == ["local"] * 5 + ["global"]
    elif name == "smollm3_3b":
      bare = [i for i, kind in enumerate(config.layer_kinds) if kind.rope is None]
      assert (bare, windowed) == ([i for i in range(36) if (i + 1) % 4 == 0], [])
    else:
      assert len(set(types)) == 1
  thetas = {
    "smollm2": 1e5, "llama3": 5e5, "mistral_7b_v0.3": 1e6, "mistral_nemo": 1e6, "qwen": 1e6,
    "gemma3": 1e6, "phi4_mini": 1e4, "phi4": 2.5e5, "smollm3": 5e6, "olmo2": 5e5,
  }  # fmt: skip
  for name, config in configs.items():
    prefix = next((p for p in thetas if name.startswith(p)), None)
    assert config.rope_theta == thetas.get(prefix, 1e4), name
  assert {c.rope_local_theta for n, c in configs.items() if n in gemmas_3} == {1e4}
  assert {n: c.rope_scaling_factor for n, c in configs.items() if c.rope_scaling_factor != 1} == {
    "llama3.1_8b": 8, "llama3.1_70b": 8, "llama3.3_70b": 8, "llama3.2_1b": 32, "llama3.2_3b": 32,
    "phi3.5_mini": 32, "phi4_mini": 32, "gemma3_4b": 8, "gemma3_12b": 8, "gemma3_27b": 8,
  }  # fmt: skip
  for switched in (
    lambda c: c.norm == "layer",
    lambda c: c.parallel_block,
    lambda c: c.use_bias,
    lambda c: not c.gated_mlp,
  ):
    assert {n for n, c in configs.items() if switched(c)} == {"phi_2"}
  partial = {n: c.rotary_dim for n, c in configs.items() if c.rotary_dim != c.head_dim}
  assert partial == {"phi_2": 32, "phi4_mini": 96}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_name_the_same_preset(alias):
  assert families.get_preset(alias) is families.get_preset(ALIASES[alias])


@pytest.mark.parametrize(
  ("name", "suggestion"),
  [
    ("meta-llama/Llama-3.2-1", "llama3.2_1b"),
    ("lama2_7b", "llama2_7b"),
    ("gemma2b", "gemma_2b"),
    ("smollm2_135", "smollm2_135m"),
  ],
)
def test_unknown_preset_gets_a_suggestion(name, suggestion):
  with pytest.raises(ValueError, match=rf"{name}'.*did you mean '{suggestion}'\?.*known: "):
    families.get_preset(name)


@pytest.mark.parametrize("name", COUNTS)
def test_presets_round_trip_through_config_json(name):
  family, config = families.get_preset(name)
  hf = json.loads(json.dumps(family.to_hf_config(config)))
  assert families.from_hf_config(hf) == (family, config)


def test_load_accepts_a_name_a_file_or_a_folder(tmp_path):
  family, config = families.get_preset("mistral_7b")
  path = tmp_path / "config.json"
  path.write_text(json.dumps(family.to_hf_config(config)))
  for source in ("mistral_7b", str(path), str(tmp_path)):
    assert families.load(source) == (family, config)


def test_load_rejects_other_arguments(tmp_path):
  with pytest.raises(ValueError, match="unknown model 'mistral'"):
    families.load("mistral")
  path = tmp_path / "config.json"
  path.write_text("{")
  with pytest.raises(ValueError, match=r"cannot read .*config\.json as a config\.json"):
    families.load(str(path))
