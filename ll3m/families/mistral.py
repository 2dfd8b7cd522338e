"""Mistral 7B (Jiang et al., 2023), with a sliding window in v0.1, and Mistral Nemo."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import llama
from ll3m.families.family import Family, Key

_MISTRAL_7B = ModelConfig(
  vocab_size=32_000, d_model=4096, d_ff=14_336, num_layers=32, num_heads=32, num_kv_heads=8,
  head_dim=128, max_positions=32_768, norm_epsilon=1e-5, sliding_window=4096,
)  # fmt: skip

FAMILY = Family(
  name="mistral",
  model_type="mistral",
  architecture="MistralForCausalLM",
  switches={},
  keys=(
    *llama.KEYS,
    Key("head_dim", "head_dim", None),
    Key("tie_embeddings", "tie_word_embeddings", False),
    Key("sliding_window", "sliding_window", 4096, nullable=True),
  ),
  activations={"silu": "silu"},
  fixed={},
  rules=llama.RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "mistral_7b": _MISTRAL_7B,
    "mistral_7b_v0.3": _MISTRAL_7B.replace(vocab_size=32_768, rope_theta=1e6, sliding_window=None),
    "mistral_nemo_12b": _MISTRAL_7B.replace(
      vocab_size=131_072,
      d_model=5120,
      num_layers=40,
      max_positions=131_072,
      rope_theta=1e6,
      sliding_window=None,
    ),
  },
  aliases={
    "Mistral-7B-v0.1": "mistral_7b",
    "Mistral-7B-Instruct-v0.1": "mistral_7b",
    "Mistral-7B-Instruct-v0.3": "mistral_7b_v0.3",
    "Mistral-Nemo": "mistral_nemo_12b",
  },
)
