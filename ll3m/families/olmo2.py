"""OLMo 2 (OLMo Team, 2025): norms after attention and feed-forward layer, and of all heads."""

from ll3m.core.model_config import ModelConfig
from ll3m.families import llama
from ll3m.families.family import Family, Key

_SWITCHES = {"norm_position": "after", "qk_norm": "all_heads"}

_OLMO2_7B = ModelConfig(
  vocab_size=100_352, d_model=4096, d_ff=11_008, num_layers=32, num_heads=32, num_kv_heads=32,
  head_dim=128, max_positions=4096, norm_epsilon=1e-6, rope_theta=5e5, **_SWITCHES,
)  # fmt: skip

FAMILY = Family(
  name="olmo2",
  model_type="olmo2",
  architecture="Olmo2ForCausalLM",
  switches=_SWITCHES,
  keys=(
    *llama.KEYS[:-1],
    Key("norm_epsilon", "rms_norm_eps", 1e-5),
    Key("tie_embeddings", "tie_word_embeddings", False),
  ),
  activations={"silu": "silu"},
  fixed={"attention_bias": False},
  rules=llama.make_rules(
    {
      "attention_out_norm": "post_attention_layernorm",
      "mlp_out_norm": "post_feedforward_layernorm",
    }
  ),
  ignored_buffers=llama.IGNORED_BUFFERS,
  presets={
    "olmo2_1b": _OLMO2_7B.replace(
      d_model=2048, d_ff=8192, num_layers=16, num_heads=16, num_kv_heads=16
    ),
    "olmo2_7b": _OLMO2_7B,
    "olmo2_13b": _OLMO2_7B.replace(
      d_model=5120, d_ff=13_824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
  },
  aliases={
    "OLMo-2-0425-1B": "olmo2_1b",
    "OLMo-2-1124-7B": "olmo2_7b",
    "OLMo-2-1124-13B": "olmo2_13b",
  },
)
