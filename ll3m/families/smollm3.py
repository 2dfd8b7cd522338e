"""SmolLM3 (Bakouch et al., 2025): every fourth layer has no rotary embedding."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import llama
from ll3m.families.family import Family, Key
from ll3m.families.layers import SMOLLM3

FAMILY = Family(
  name="smollm3",
  model_type="smollm3",
  architecture="SmolLM3ForCausalLM",
  switches={},
  keys=(
    *llama.KEYS,
    Key("tie_embeddings", "tie_word_embeddings", True),
    Key("sliding_window", "sliding_window", None),
  ),
  activations={"silu": "silu"},
  fixed={"attention_bias": False, "mlp_bias": False},
  rules=llama.RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "smollm3_3b": ModelConfig(
      vocab_size=128_256,
      d_model=2048,
      d_ff=11_008,
      num_layers=36,
      num_heads=16,
      num_kv_heads=4,
      head_dim=128,
      max_positions=65_536,
      norm_epsilon=1e-6,
      rope_theta=5e6,
      tie_embeddings=True,
      layer_types=("full", "full", "full", "no_rope"),
    ),
  },
  aliases={"SmolLM3-3B": "smollm3_3b"},
  layers=SMOLLM3,
  rope_theta=2e6,
)
