"""Phi-2 (Javaheripi et al., 2023): parallel block, LayerNorm, biases, partial rotary."""

from ll3m.core.model_config import ModelConfig
from ll3m.families.family import Family, Key
from ll3m.families.tensor_rules import Rule

_LAYER = "model.layers.{layer}"
_SWITCHES = {
  "norm": "layer",
  "gated_mlp": False,
  "parallel_block": True,
  "use_bias": True,
  # The default of config.json, which the file may override.
  "rotary_fraction": 0.5,
}


def _linear(ours, hf, shape, when=lambda c: True) -> tuple[Rule, Rule]:
  """Returns the rules for a weight, stored as [out, in] in the checkpoint, and its bias."""
  return (
    Rule(f"{ours}/w", f"{hf}.weight", shape, transpose=True, when=when),
    Rule(f"{ours}/b", f"{hf}.bias", lambda c: shape(c)[1:]),
  )


def _norm(ours, hf) -> tuple[Rule, Rule]:
  return (
    Rule(f"{ours}/scale", f"{hf}.weight", lambda c: (c.d_model,)),
    Rule(f"{ours}/bias", f"{hf}.bias", lambda c: (c.d_model,)),
  )


_ATTENTION = f"{_LAYER}.self_attn"
_RULES = (
  Rule("embed/embedding", "model.embed_tokens.weight", lambda c: (c.vocab_size, c.d_model)),
  *_norm("layers/attention_norm", f"{_LAYER}.input_layernorm"),
  *_linear(
    "layers/attention/query",
    f"{_ATTENTION}.q_proj",
    lambda c: (c.d_model, c.num_heads * c.head_dim),
  ),
  *_linear(
    "layers/attention/key",
    f"{_ATTENTION}.k_proj",
    lambda c: (c.d_model, c.num_kv_heads * c.head_dim),
  ),
  *_linear(
    "layers/attention/value",
    f"{_ATTENTION}.v_proj",
    lambda c: (c.d_model, c.num_kv_heads * c.head_dim),
  ),
  *_linear(
    "layers/attention/out",
    f"{_ATTENTION}.dense",
    lambda c: (c.num_heads * c.head_dim, c.d_model),
  ),
  *_linear("layers/mlp/up", f"{_LAYER}.mlp.fc1", lambda c: (c.d_model, c.d_ff)),
  *_linear("layers/mlp/down", f"{_LAYER}.mlp.fc2", lambda c: (c.d_ff, c.d_model)),
  *_norm("final_norm", "model.final_layernorm"),
  *_linear(
    "head", "lm_head", lambda c: (c.d_model, c.vocab_size), when=lambda c: not c.tie_embeddings
  ),
)

FAMILY = Family(
  name="phi",
  model_type="phi",
  architecture="PhiForCausalLM",
  switches=_SWITCHES,
  keys=(
    Key("vocab_size", "vocab_size"),
    Key("d_model", "hidden_size"),
    Key("d_ff", "intermediate_size"),
    Key("num_layers", "num_hidden_layers"),
    Key("num_heads", "num_attention_heads"),
    Key("num_kv_heads", "num_key_value_heads", None),
    Key("max_positions", "max_position_embeddings", 2048),
    Key("norm_epsilon", "layer_norm_eps", 1e-5),
    Key("tie_embeddings", "tie_word_embeddings", False),
  ),
  activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
  fixed={"qk_layernorm": False},
  rules=_RULES,
  ignored_buffers=(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
  ),
  presets={
    "phi_2": ModelConfig(
      vocab_size=51_200,
      d_model=2560,
      d_ff=10_240,
      num_layers=32,
      num_heads=32,
      num_kv_heads=32,
      head_dim=80,
      max_positions=2048,
      norm_epsilon=1e-5,
      activation="gelu_tanh",
      **(_SWITCHES | {"rotary_fraction": 0.4}),
    ),
  },  # fmt: skip
  aliases={},
)
