import json
import math

import jax
import pytest

from ll3m import families
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
  "phi4": 14_659_507_200,
  "smollm3_3b": 3_075_098_624,
  "olmo2_1b": 1_484_916_736,
  "olmo2_7b": 7_298_617_344,
  "olmo2_13b": 13_716_198_400,
}
ALIASES = {"llama_7b": "llama2_7b", "llama_13b": "llama2_13b", "llama_70b": "llama2_70b"}

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
}


def abstract_shapes(config):
  shapes = jax.eval_shape(make_model(config).init, jax.random.key(0))
  return {
    f"{module}/{name}": leaf.shape
    for module, leaves in shapes.items()
    for name, leaf in leaves.items()
  }


def test_every_preset_is_in_the_tables():
  assert set(families.PRESETS) == set(COUNTS) == set(DIMENSIONS)
  assert families.ALIASES == ALIASES


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
  gemmas = {"gemma_2b", "gemma_7b"}
  assert {n for n, c in configs.items() if c.tie_embeddings} == gemmas | {"smollm2_135m"}
  assert {n for n, c in configs.items() if c.scale_embeddings} == gemmas
  assert {n for n, c in configs.items() if c.norm_scale_offset == 1} == gemmas
  assert {n: c.activation for n, c in configs.items() if c.activation != "silu"} == {
    "gemma_2b": "gelu_tanh",
    "gemma_7b": "gelu_tanh",
    "phi_2": "gelu_tanh",
  }
  assert {n: c.sliding_window for n, c in configs.items() if c.sliding_window} == {
    "mistral_7b": 4096
  }
  assert {n: c.rope_theta for n, c in configs.items() if c.rope_theta != 1e4} == {
    "smollm2_135m": 1e5
  }
  assert all(c.rope_scaling_factor == 1 for c in configs.values())
  for switched in (
    lambda c: c.norm == "layer",
    lambda c: c.parallel_block,
    lambda c: c.use_bias,
    lambda c: not c.gated_mlp,
    lambda c: c.rotary_dim != c.head_dim,
  ):
    assert {n for n, c in configs.items() if switched(c)} == {"phi_2"}
  assert configs["phi_2"].rotary_dim == 32


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_name_the_same_preset(alias):
  assert families.get_preset(alias) is families.get_preset(ALIASES[alias])


@pytest.mark.parametrize(
  ("name", "suggestion"),
  [("lama2_7b", "llama2_7b"), ("gemma2b", "gemma_2b"), ("smollm2_135M", "smollm2_135m")],
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
