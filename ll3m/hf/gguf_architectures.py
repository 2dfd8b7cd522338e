"""The architectures of GGUF files, as data; each has the name of LL3M's family.

The tables follow llama.cpp, whose converter defines the names and changes some tensors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

# Names of tensors in Hugging Face's models, by their names in GGUF.
NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
# The same within a layer, for most architectures.
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_qkv": "self_attn.qkv_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "attn_output": "self_attn.o_proj",
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
  "post_ffw_norm": "post_feedforward_layernorm",
}


class Key(NamedTuple):
  """A metadata key and the key of config.json with the same meaning.

  Attributes:
    gguf: The metadata key, without the architecture.
    hf: The key of config.json.
    default: llama.cpp's value for files without the key.
  """

  gguf: str
  hf: str
  default: Any


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What an architecture's files differ in.

  Attributes:
    interleaved: Whether the rows of q and k are in the order (h, i, half), for the rotary
      convention of llama.cpp, instead of (h, half, i).
    norm_offset: The number that the converter adds to the weights of norms.
    layer_names: Names of tensors in Hugging Face's models, by their names within a layer.
    keys: Keys that other architectures do not have; zero means None.
    period: If layers alternate: every period-th one has no window. A file may say otherwise.
    scaled_layers: Number of layers of the size whose scores are divided by the square root of
      d_model / num_heads instead of head_dim; None if there is no such size.
  """

  interleaved: bool = False
  norm_offset: float = 0.0
  layer_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LAYER_NAMES)
  keys: tuple[Key, ...] = ()
  period: int | None = None
  scaled_layers: int | None = None


_GEMMA = Architecture(norm_offset=1.0)
_FOUR_NORMS = _LAYER_NAMES | {"ffn_norm": "pre_feedforward_layernorm"}

ARCHITECTURES = {
  "llama": Architecture(interleaved=True),  # Mistral as well
  "gemma": _GEMMA,
  "gemma2": dataclasses.replace(
    _GEMMA,
    layer_names=_FOUR_NORMS,
    keys=(
      Key("attention.sliding_window", "sliding_window", 4096),
      Key("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
      Key("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ),
    period=2,
    scaled_layers=46,
  ),
  "gemma3": dataclasses.replace(
    _GEMMA,
    layer_names=_FOUR_NORMS,
    keys=(
      Key("attention.sliding_window", "sliding_window", None),
      Key("final_logit_softcapping", "final_logit_softcapping", None),
      Key("rope.freq_base_swa", "rope_local_base_freq", 10_000.0),
    ),
    period=6,
    scaled_layers=62,
  ),
  "phi3": Architecture(
    layer_names=_LAYER_NAMES | {"ffn_up": "mlp.gate_up_proj"},
    keys=(Key("attention.sliding_window", "sliding_window", None),),
  ),
  "qwen2": Architecture(),
  "qwen3": Architecture(),
  "smollm3": Architecture(interleaved=True),
  "olmo2": Architecture(),
}
