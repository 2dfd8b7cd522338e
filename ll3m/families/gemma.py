"""Gemma (Gemma Team, 2024): GeGLU, (1 + w) norms, scaled and tied embeddings, 256-wide heads."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import llama
from ll3m.families.family import Family, Key

SWITCHES = {"norm_scale_offset": 1.0, "scale_embeddings": True}

_GEMMA_2B = ModelConfig(
  vocab_size=256_000, d_model=2048, d_ff=16_384, num_layers=18, num_heads=8, num_kv_heads=1,
  head_dim=256, max_positions=8192, norm_epsilon=1e-6, activation="gelu_tanh",
  tie_embeddings=True, **SWITCHES,
)  # fmt: skip

FAMILY = Family(
  name="gemma",
  model_type="gemma",
  architecture="GemmaForCausalLM",
  switches=SWITCHES,
  keys=(
    *llama.KEYS,
    Key("head_dim", "head_dim", 256),
    Key("tie_embeddings", "tie_word_embeddings", True),
  ),
  # In the published files, "gelu" denotes its tanh approximation.
  activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"},
  fixed={"attention_bias": False},
  rules=llama.RULES,
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "gemma_2b": _GEMMA_2B,
    "gemma_7b": _GEMMA_2B.replace(
      d_model=3072, d_ff=24_576, num_layers=28, num_heads=16, num_kv_heads=16
    ),
  },
  aliases={},
)
