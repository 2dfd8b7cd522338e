"""Qwen 2.5 (Qwen Team, 2024) with biases on queries, keys and values; Qwen 3 (2025) with norms."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import llama
from ll3m.families.family import Family, Key
from ll3m.families.layers import QWEN

_KEYS = (
  *llama.KEYS,
  Key("tie_embeddings", "tie_word_embeddings", False),
  Key("sliding_window", "sliding_window", 4096, nullable=True),
)
_QWEN2_SWITCHES = {"qkv_bias": True}
_QWEN3_SWITCHES = {"qk_norm": "per_head"}

_QWEN25_7B = ModelConfig(
  vocab_size=152_064, d_model=3584, d_ff=18_944, num_layers=28, num_heads=28, num_kv_heads=4,
  head_dim=128, max_positions=131_072, norm_epsilon=1e-6, rope_theta=1e6, **_QWEN2_SWITCHES,
)  # fmt: skip
_QWEN25_SMALL = _QWEN25_7B.replace(
  vocab_size=151_936, num_kv_heads=2, max_positions=32_768, tie_embeddings=True
)
_QWEN25_LARGE = _QWEN25_7B.replace(d_model=5120, num_heads=40, num_kv_heads=8)
_QWEN3_8B = ModelConfig(
  vocab_size=151_936, d_model=4096, d_ff=12_288, num_layers=36, num_heads=32, num_kv_heads=8,
  head_dim=128, max_positions=40_960, norm_epsilon=1e-6, rope_theta=1e6, **_QWEN3_SWITCHES,
)  # fmt: skip
_QWEN3_SMALL = _QWEN3_8B.replace(num_layers=28, num_heads=16, tie_embeddings=True)

QWEN2 = Family(
  name="qwen2",
  model_type="qwen2",
  architecture="Qwen2ForCausalLM",
  switches=_QWEN2_SWITCHES,
  keys=_KEYS,
  activations={"silu": "silu"},
  fixed={},
  rules=llama.RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "qwen2.5_0.5b": _QWEN25_SMALL.replace(
      d_model=896, d_ff=4864, num_layers=24, num_heads=14, head_dim=64
    ),
    "qwen2.5_1.5b": _QWEN25_SMALL.replace(
      d_model=1536, d_ff=8960, num_heads=12, max_positions=131_072
    ),
    "qwen2.5_3b": _QWEN25_SMALL.replace(d_model=2048, d_ff=11_008, num_layers=36, num_heads=16),
    "qwen2.5_7b": _QWEN25_7B,
    "qwen2.5_14b": _QWEN25_LARGE.replace(d_ff=13_824, num_layers=48),
    "qwen2.5_32b": _QWEN25_LARGE.replace(d_ff=27_648, num_layers=64),
    "qwen2.5_72b": _QWEN25_LARGE.replace(d_model=8192, d_ff=29_568, num_layers=80, num_heads=64),
  },
  aliases={
    f"Qwen2.5-{size}": f"qwen2.5_{size}"
    for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
  },
  layers=QWEN,
)

QWEN3 = Family(
  name="qwen3",
  model_type="qwen3",
  architecture="Qwen3ForCausalLM",
  switches=_QWEN3_SWITCHES,
  keys=(*_KEYS, Key("head_dim", "head_dim", 128)),
  activations={"silu": "silu"},
  fixed={"attention_bias": False},
  rules=llama.RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "qwen3_0.6b": _QWEN3_SMALL.replace(d_model=1024, d_ff=3072),
    "qwen3_1.7b": _QWEN3_SMALL.replace(d_model=2048, d_ff=6144),
    "qwen3_4b": _QWEN3_8B.replace(d_model=2560, d_ff=9728, tie_embeddings=True),
    "qwen3_8b": _QWEN3_8B,
    "qwen3_14b": _QWEN3_8B.replace(d_model=5120, d_ff=17_408, num_layers=40, num_heads=40),
    "qwen3_32b": _QWEN3_8B.replace(d_model=5120, d_ff=25_600, num_layers=64, num_heads=64),
  },
  aliases={f"Qwen3-{size}": f"qwen3_{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")},
  layers=QWEN,
)
