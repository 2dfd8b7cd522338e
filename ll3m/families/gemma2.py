"""Gemma 2 (Gemma Team, 2024): norms before and after, soft caps, a window in every second layer."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import gemma, llama
from ll3m.families.family import Family, Key
from ll3m.families.layers import GEMMA2

SWITCHES = gemma.SWITCHES | {"norm_position": "both"}

# Gemma 3 has the same names.
RULES = llama.make_rules(
  {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
  }
)
KEYS = (
  *llama.KEYS,
  Key("head_dim", "head_dim", 256),
  Key("tie_embeddings", "tie_word_embeddings", True),
  Key("query_pre_attn_scalar", "query_pre_attn_scalar", 256, whole=True),
  Key("sliding_window", "sliding_window", 4096, nullable=True),
)

_GEMMA2_9B = ModelConfig(
  vocab_size=256_000, d_model=3584, d_ff=14_336, num_layers=42, num_heads=16, num_kv_heads=8,
  head_dim=256, max_positions=8192, norm_epsilon=1e-6, activation="gelu_tanh",
  tie_embeddings=True, query_pre_attn_scalar=256.0, attention_soft_cap=50.0, final_soft_cap=30.0,
  sliding_window=4096, layer_types=("sliding", "full"), **SWITCHES,
)  # fmt: skip

FAMILY = Family(
  name="gemma2",
  model_type="gemma2",
  architecture="Gemma2ForCausalLM",
  switches=SWITCHES,
  keys=(
    *KEYS,
    Key("attention_soft_cap", "attn_logit_softcapping", 50.0, nullable=True),
    Key("final_soft_cap", "final_logit_softcapping", 30.0, nullable=True),
  ),
  activations=gemma.FAMILY.activations,
  fixed={"attention_bias": False},
  rules=RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "gemma2_2b": _GEMMA2_9B.replace(
      d_model=2304, d_ff=9216, num_layers=26, num_heads=8, num_kv_heads=4
    ),
    "gemma2_9b": _GEMMA2_9B,
    "gemma2_27b": _GEMMA2_9B.replace(
      d_model=4608,
      d_ff=36_864,
      num_layers=46,
      num_heads=32,
      num_kv_heads=16,
      head_dim=128,
      query_pre_attn_scalar=144.0,
    ),
  },
  aliases={f"gemma-2-{size}": f"gemma2_{size}" for size in ("2b", "9b", "27b")},
  layers=GEMMA2,
)
