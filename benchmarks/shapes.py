"""The shapes of real models, shared by the kernels' tests and the benchmarks.

They come from the presets. A shape that several models share is listed once, under the first
model's name. The tables hold the models of `MODELS`, whose kinds of shapes all others share: group
sizes, head dims, windows, soft caps and layouts. `every` has all presets.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ll3m.core.model_config import ModelConfig
from ll3m.families import PRESETS


class AttentionShape(NamedTuple):
  """Heads of a self-attention: N, K, H, the keys that a query sees, and the scores' soft cap.

  The window counts the query's own key.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  window: int | None
  soft_cap: float | None = None

  @property
  def group(self) -> int:
    """G = N / K."""
    return self.num_heads // self.num_kv_heads


class RotaryShape(NamedTuple):
  """Heads of a rotary embedding: N, K, H, and the number of rotated dimensions."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rotary_dim: int


class NormShape(NamedTuple):
  """Features D, "rms" or "layer", and the constant added to the scale."""

  features: int
  kind: str
  scale_offset: float


class HeadShape(NamedTuple):
  """A linear head: D, V, its layout ("dv", or "vd" if tied), and whether it has a bias."""

  features: int
  vocab_size: int
  layout: str
  has_bias: bool


def attention_shapes(config: ModelConfig) -> list[AttentionShape]:
  """Returns the shapes of the kinds of layers; a window of all positions is none."""
  windows = dict.fromkeys(kind.window for kind in config.pattern)
  heads = config.num_heads, config.num_kv_heads, config.head_dim
  most = config.max_positions
  return [
    AttentionShape(*heads, window if window and window < most else None, config.attention_soft_cap)
    for window in windows
  ]


def rotary_shapes(config: ModelConfig) -> list[RotaryShape]:
  return [RotaryShape(config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim)]


def norm_shapes(config: ModelConfig) -> list[NormShape]:
  """Returns the shapes of the norms of the residual stream, and of those of queries and keys."""
  shapes = [NormShape(config.d_model, config.norm, config.norm_scale_offset)]
  if config.qk_norm == "per_head":
    shapes.append(NormShape(config.head_dim, "rms", config.norm_scale_offset))
  return shapes


def head_shapes(config: ModelConfig) -> list[HeadShape]:
  layout = "vd" if config.tie_embeddings else "dv"
  return [HeadShape(config.d_model, config.vocab_size, layout, config.use_bias)]


def every[Shape](
  shapes_of: Callable[[ModelConfig], list[Shape]], models: Iterable[str] = PRESETS
) -> dict[str, Shape]:
  """Returns the distinct shapes of models; the second of a model is named "model, 2nd"."""
  found: dict[str, Shape] = {}
  for name in models:
    for shape in shapes_of(PRESETS[name].config):
      if shape not in found.values():
        found[name if name not in found else f"{name}, 2nd"] = shape
  return found


MODELS = (
  "llama2_7b", "llama2_13b", "llama2_70b", "mistral_7b", "gemma_2b", "gemma_7b", "open_llama_3b",
  "tiny_llama_1b", "smollm2_135m", "phi_2", "llama3_8b", "qwen2.5_7b", "qwen3_8b", "gemma2_9b",
  "gemma3_270m", "gemma3_4b", "phi3_mini", "phi4_mini",
)  # fmt: skip
ATTENTION: dict[str, AttentionShape] = every(attention_shapes, MODELS)
ROTARY: dict[str, RotaryShape] = every(rotary_shapes, MODELS)
NORMS: dict[str, NormShape] = every(norm_shapes, MODELS)
HEADS: dict[str, HeadShape] = every(head_shapes, MODELS)
