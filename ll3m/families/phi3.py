"""Phi-3 and Phi-4 (Abdin et al., 2024): fused projections in the files, LongRoPE in some."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import llama
from ll3m.families.family import Family, Key

_PHI3_MINI = ModelConfig(
  vocab_size=32_064, d_model=3072, d_ff=8192, num_layers=32, num_heads=32, num_kv_heads=32,
  head_dim=96, max_positions=4096, norm_epsilon=1e-5, sliding_window=2047,
)  # fmt: skip
_LONGROPE = {
  "max_positions": 131_072,
  "rope_scaling": "longrope",
  "rope_scaling_factor": 32.0,
  "rope_original_positions": 4096,
  "sliding_window": 262_144,
}

FAMILY = Family(
  name="phi3",
  model_type="phi3",
  architecture="Phi3ForCausalLM",
  # The default of config.json, which the file may override.
  switches={"rotary_fraction": 1.0},
  keys=(
    *llama.KEYS,
    Key("tie_embeddings", "tie_word_embeddings", False),
    Key("sliding_window", "sliding_window", None, nullable=True),
  ),
  activations={"silu": "silu"},
  fixed={"attention_bias": False},
  rules=llama.make_rules(llama.NORMS, fused=True),
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "phi3_mini": _PHI3_MINI,
    "phi4": _PHI3_MINI.replace(
      vocab_size=100_352,
      d_model=5120,
      d_ff=17_920,
      num_layers=40,
      num_heads=40,
      num_kv_heads=10,
      head_dim=128,
      max_positions=16_384,
      rope_theta=250_000.0,
      sliding_window=None,
    ),
  },
  aliases={
    "microsoft/Phi-3-mini-4k-instruct": "phi3_mini",
    "microsoft/phi-4": "phi4",
  },
  computed=lambda config: {
    "original_max_position_embeddings": config.rope_original_positions or config.max_positions
  },
)
