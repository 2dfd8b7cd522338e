"""Llama 2 (Touvron et al., 2023), OpenLLaMA v2, TinyLlama and SmolLM2, of the same architecture."""

from ll3m.core.model_config import ModelConfig
from ll3m.families.family import Family, Key
from ll3m.families.tensor_rules import Rule

_LAYER = "model.layers.{layer}"

# Mistral and Gemma use the same tensor names.
RULES = (
  Rule("embed/embedding", "model.embed_tokens.weight", lambda c: (c.vocab_size, c.d_model)),
  Rule("layers/attention_norm/scale", f"{_LAYER}.input_layernorm.weight", lambda c: (c.d_model,)),
  Rule(
    "layers/attention/query/w",
    f"{_LAYER}.self_attn.q_proj.weight",
    lambda c: (c.d_model, c.num_heads * c.head_dim),
    transpose=True,
  ),
  Rule(
    "layers/attention/key/w",
    f"{_LAYER}.self_attn.k_proj.weight",
    lambda c: (c.d_model, c.num_kv_heads * c.head_dim),
    transpose=True,
  ),
  Rule(
    "layers/attention/value/w",
    f"{_LAYER}.self_attn.v_proj.weight",
    lambda c: (c.d_model, c.num_kv_heads * c.head_dim),
    transpose=True,
  ),
  Rule(
    "layers/attention/out/w",
    f"{_LAYER}.self_attn.o_proj.weight",
    lambda c: (c.num_heads * c.head_dim, c.d_model),
    transpose=True,
  ),
  Rule(
    "layers/mlp_norm/scale", f"{_LAYER}.post_attention_layernorm.weight", lambda c: (c.d_model,)
  ),
  Rule(
    "layers/mlp/gate/w",
    f"{_LAYER}.mlp.gate_proj.weight",
    lambda c: (c.d_model, c.d_ff),
    transpose=True,
  ),
  Rule(
    "layers/mlp/up/w",
    f"{_LAYER}.mlp.up_proj.weight",
    lambda c: (c.d_model, c.d_ff),
    transpose=True,
  ),
  Rule(
    "layers/mlp/down/w",
    f"{_LAYER}.mlp.down_proj.weight",
    lambda c: (c.d_ff, c.d_model),
    transpose=True,
  ),
  Rule("final_norm/scale", "model.norm.weight", lambda c: (c.d_model,)),
  Rule(
    "head/w",
    "lm_head.weight",
    lambda c: (c.d_model, c.vocab_size),
    transpose=True,
    when=lambda c: not c.tie_embeddings,
  ),
)

# Keys common to Llama, Mistral and Gemma.
KEYS = (
  Key("vocab_size", "vocab_size"),
  Key("d_model", "hidden_size"),
  Key("d_ff", "intermediate_size"),
  Key("num_layers", "num_hidden_layers"),
  Key("num_heads", "num_attention_heads"),
  Key("num_kv_heads", "num_key_value_heads", None),
  Key("max_positions", "max_position_embeddings"),
  Key("norm_epsilon", "rms_norm_eps", 1e-6),
)

# Buffers in the files of OpenLLaMA and early Llama 2; they can be computed from the config.
IGNORED_BUFFERS = (
  r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
  r"model\.rotary_emb\.inv_freq",
)

_LLAMA2_7B = ModelConfig(
  vocab_size=32_000, d_model=4096, d_ff=11_008, num_layers=32, num_heads=32, num_kv_heads=32,
  head_dim=128, max_positions=4096, norm_epsilon=1e-5,
)  # fmt: skip
_OPEN_LLAMA_7B = _LLAMA2_7B.replace(max_positions=2048, norm_epsilon=1e-6)

FAMILY = Family(
  name="llama",
  model_type="llama",
  architecture="LlamaForCausalLM",
  switches={},
  keys=(
    *KEYS,
    Key("head_dim", "head_dim", None),
    Key("tie_embeddings", "tie_word_embeddings", False),
  ),
  activations={"silu": "silu"},
  fixed={"attention_bias": False, "mlp_bias": False},
  rules=RULES,
  ignored_buffers=IGNORED_BUFFERS,
  presets={
    "llama2_7b": _LLAMA2_7B,
    "llama2_13b": _LLAMA2_7B.replace(
      d_model=5120, d_ff=13_824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama2_70b": _LLAMA2_7B.replace(
      d_model=8192, d_ff=28_672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
    "open_llama_3b": _OPEN_LLAMA_7B.replace(d_model=3200, d_ff=8640, num_layers=26, head_dim=100),
    "open_llama_7b": _OPEN_LLAMA_7B,
    "tiny_llama_1b": _LLAMA2_7B.replace(
      d_model=2048, d_ff=5632, num_layers=22, num_kv_heads=4, head_dim=64, max_positions=2048
    ),
    "smollm2_135m": _LLAMA2_7B.replace(
      vocab_size=49_152,
      d_model=576,
      d_ff=1536,
      num_layers=30,
      num_heads=9,
      num_kv_heads=3,
      head_dim=64,
      max_positions=8192,
      rope_theta=1e5,
      tie_embeddings=True,
    ),
  },  # fmt: skip
  aliases={"llama_7b": "llama2_7b", "llama_13b": "llama2_13b", "llama_70b": "llama2_70b"},
)
