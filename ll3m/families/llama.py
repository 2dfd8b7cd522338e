"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), and models built like them.

These are OpenLLaMA v2, TinyLlama and SmolLM2.
"""

from collections.abc import Callable, Iterator, Mapping

from ll3m.core.model_config import ModelConfig
from ll3m.families.family import Family, Key
from ll3m.families.tensor_rules import Rule

_LAYER = "model.layers.{layer}"

# The norms of a layer, by the names of their parameters.
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def make_rules(norms: Mapping[str, str], *, fused: bool = False) -> tuple[Rule, ...]:
  """Returns the rules of an architecture with Llama's modules.

  Args:
    norms: The names of each layer's norms in checkpoints, by their names in LL3M.
    fused: Whether files hold queries, keys and values in one tensor, and gate and up in another.
  """
  heads = {
    "query": lambda c: c.num_heads * c.head_dim,
    "key": lambda c: c.num_kv_heads * c.head_dim,
    "value": lambda c: c.num_kv_heads * c.head_dim,
  }
  widths = {"gate": lambda c: c.d_ff, "up": lambda c: c.d_ff}
  return (
    Rule("embed/embedding", "model.embed_tokens.weight", lambda c: (c.vocab_size, c.d_model)),
    *(
      Rule(f"layers/{ours}/scale", f"{_LAYER}.{hf}.weight", lambda c: (c.d_model,))
      for ours, hf in norms.items()
    ),
    *_projections("attention", "self_attn", heads, "qkv_proj" if fused else None),
    *(
      Rule(
        f"layers/attention/{ours}/b", f"{_LAYER}.self_attn.{ours[0]}_proj.bias", shape, when=when
      )
      for ours, shape, when in (
        (name, lambda c, size=size: (size(c),), lambda c: c.qkv_bias)
        for name, size in heads.items()
      )
    ),
    *(
      Rule(
        f"layers/attention/{ours}_norm/scale",
        f"{_LAYER}.self_attn.{ours[0]}_norm.weight",
        lambda c, size=heads[ours]: (c.head_dim if c.qk_norm == "per_head" else size(c),),
        when=lambda c: c.qk_norm is not None,
      )
      for ours in ("query", "key")
    ),
    Rule(
      "layers/attention/out/w",
      f"{_LAYER}.self_attn.o_proj.weight",
      lambda c: (c.num_heads * c.head_dim, c.d_model),
      transpose=True,
    ),
    *_projections("mlp", "mlp", widths, "gate_up_proj" if fused else None),
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


def _projections(
  module: str, hf: str, sizes: Mapping[str, Callable[[ModelConfig], int]], fused: str | None
) -> Iterator[Rule]:
  """Yields the rules of projections of the residual stream, of the given output sizes."""
  names = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "gate": "gate_proj",
    "up": "up_proj",
  }
  for part, (ours, size) in enumerate(sizes.items()):
    yield Rule(
      f"layers/{module}/{ours}/w",
      f"{_LAYER}.{hf}.{fused or names[ours]}.weight",
      lambda c, size=size: (c.d_model, size(c)),
      transpose=True,
      part=part if fused else None,
    )


# Mistral, Gemma and others use the same tensor names.
RULES = make_rules(NORMS)

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
_LLAMA3_8B = _LLAMA2_7B.replace(
  vocab_size=128_256, d_ff=14_336, num_kv_heads=8, max_positions=8192, rope_theta=5e5
)
_LLAMA3_70B = _LLAMA3_8B.replace(d_model=8192, d_ff=28_672, num_layers=80, num_heads=64)
_LLAMA31 = {
  "max_positions": 131_072, "rope_scaling": "llama3", "rope_scaling_factor": 8.0,
  "rope_original_positions": 8192, "rope_frequency_factors": (1.0, 4.0),
}  # fmt: skip
_LLAMA32 = _LLAMA31 | {"rope_scaling_factor": 32.0, "tie_embeddings": True}
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
    "llama3_8b": _LLAMA3_8B,
    "llama3_70b": _LLAMA3_70B,
    "llama3.1_8b": _LLAMA3_8B.replace(**_LLAMA31),
    "llama3.1_70b": _LLAMA3_70B.replace(**_LLAMA31),
    "llama3.2_1b": _LLAMA3_8B.replace(
      d_model=2048, d_ff=8192, num_layers=16, head_dim=64, **_LLAMA32
    ),
    "llama3.2_3b": _LLAMA3_8B.replace(
      d_model=3072, d_ff=8192, num_layers=28, num_heads=24, **_LLAMA32
    ),
    "llama3.3_70b": _LLAMA3_70B.replace(**_LLAMA31),
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
  aliases={
    "llama_7b": "llama2_7b",
    "llama_13b": "llama2_13b",
    "llama_70b": "llama2_70b",
    **{f"Llama-2-{size}": f"llama2_{size}" for size in ("7b", "13b", "70b")},
    **{f"Llama-3-{size}": f"llama3_{size}" for size in ("8b", "70b")},
    **{f"Llama-3.1-{size}": f"llama3.1_{size}" for size in ("8b", "70b")},
    **{f"Llama-3.2-{size}": f"llama3.2_{size}" for size in ("1b", "3b")},
    "Llama-3.3-70B": "llama3.3_70b",
    "TinyLlama-1.1B": "tiny_llama_1b",
    "open_llama_3b_v2": "open_llama_3b",
    "open_llama_7b_v2": "open_llama_7b",
    "SmolLM2-135M": "smollm2_135m",
  },
)
