"""Mistral 7B v0.1 (Jiang et al., 2023): GQA and a sliding window."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import llama
from ll3m.families.family import Family, Key

FAMILY = Family(
  name="mistral",
  model_type="mistral",
  architecture="MistralForCausalLM",
  switches={},
  keys=(
    *llama.KEYS,
    Key("head_dim", "head_dim", None),
    Key("tie_embeddings", "tie_word_embeddings", False),
    Key("sliding_window", "sliding_window", 4096),
  ),
  activations={"silu": "silu"},
  fixed={},
  rules=llama.RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "mistral_7b": ModelConfig(
      vocab_size=32_000,
      d_model=4096,
      d_ff=14_336,
      num_layers=32,
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
      max_positions=32_768,
      norm_epsilon=1e-5,
      sliding_window=4096,
    ),
  },  # fmt: skip
  aliases={},
)
