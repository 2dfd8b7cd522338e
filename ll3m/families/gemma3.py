"""Gemma 3 (Gemma Team, 2025), text: norms of queries and keys, a window in five of six layers."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import gemma, gemma2, llama
from ll3m.families.family import Family, Key
from ll3m.families.layers import GEMMA3

_SWITCHES = gemma2.SWITCHES | {"qk_norm": "per_head"}

_GEMMA3_1B = ModelConfig(
  vocab_size=262_144, d_model=1152, d_ff=6912, num_layers=26, num_heads=4, num_kv_heads=1,
  head_dim=256, max_positions=32_768, norm_epsilon=1e-6, activation="gelu_tanh",
  tie_embeddings=True, query_pre_attn_scalar=256.0, rope_theta=1e6, rope_local_theta=1e4,
  sliding_window=512, layer_types=("sliding",) * 5 + ("full",), **_SWITCHES,
)  # fmt: skip
_GEMMA3_4B = _GEMMA3_1B.replace(
  vocab_size=262_208,
  d_model=2560,
  d_ff=10_240,
  num_layers=34,
  num_heads=8,
  num_kv_heads=4,
  max_positions=131_072,
  rope_scaling_factor=8.0,
  sliding_window=1024,
)

# Sizes that `text_config` of a multimodal config.json may omit; those of transformers.
TEXT_DEFAULTS = {
  "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
  "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
  "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
}  # fmt: skip

FAMILY = Family(
  name="gemma3",
  model_type="gemma3_text",
  architecture="Gemma3ForCausalLM",
  switches=_SWITCHES,
  keys=(
    *gemma2.KEYS,
    Key("attention_soft_cap", "attn_logit_softcapping", None),
    Key("final_soft_cap", "final_logit_softcapping", None),
  ),
  activations=gemma.FAMILY.activations,
  fixed={"attention_bias": False},
  rules=gemma2.RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "gemma3_270m": _GEMMA3_1B.replace(d_model=640, d_ff=2048, num_layers=18),
    "gemma3_1b": _GEMMA3_1B,
    "gemma3_4b": _GEMMA3_4B,
    "gemma3_12b": _GEMMA3_4B.replace(
      d_model=3840, d_ff=15_360, num_layers=48, num_heads=16, num_kv_heads=8
    ),
    "gemma3_27b": _GEMMA3_4B.replace(
      d_model=5376,
      d_ff=21_504,
      num_layers=62,
      num_heads=32,
      num_kv_heads=16,
      head_dim=128,
      query_pre_attn_scalar=168.0,
    ),
  },
  aliases={f"gemma-3-{size}": f"gemma3_{size}" for size in ("270m", "1b", "4b", "12b", "27b")},
  layers=GEMMA3,
  rope_theta=1e6,
  rope_local_theta=1e4,
)
