"""The shapes of real models, shared by the kernels' tests and the benchmarks.

They come from the presets. A shape that several models share is listed once, under the first
model's name.
"""

from typing import NamedTuple

from ll3m.core.model_config import ModelConfig
from ll3m.families import PRESETS


class AttentionShape(NamedTuple):
  """Heads of a self-attention: N, K, H, and the keys that a query sees, including its own."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  window: int | None

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


def _attention(config: ModelConfig) -> AttentionShape:
  return AttentionShape(
    config.num_heads, config.num_kv_heads, config.head_dim, config.sliding_window
  )


def _rotary(config: ModelConfig) -> RotaryShape:
  return RotaryShape(config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim)


def _norm(config: ModelConfig) -> NormShape:
  return NormShape(config.d_model, config.norm, config.norm_scale_offset)


def _head(config: ModelConfig) -> HeadShape:
  layout = "vd" if config.tie_embeddings else "dv"
  return HeadShape(config.d_model, config.vocab_size, layout, config.use_bias)


def _distinct[Shape](shape_of) -> dict[str, Shape]:
  found: dict[str, Shape] = {}
  for name, preset in PRESETS.items():
    shape = shape_of(preset.config)
    if shape not in found.values():
      found[name] = shape
  return found


ATTENTION: dict[str, AttentionShape] = _distinct(_attention)
ROTARY: dict[str, RotaryShape] = _distinct(_rotary)
NORMS: dict[str, NormShape] = _distinct(_norm)
HEADS: dict[str, HeadShape] = _distinct(_head)
