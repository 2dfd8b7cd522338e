"""The architecture of a decoder-only transformer: sizes, and switches in which families differ."""

import ast
import dataclasses
import difflib
import re
from typing import Any

from ll3m.core.field_types import convert, has_type, type_name
from ll3m.core.layer_stacks import LayerKind, Stack, shortest_cycle, stacks_of

NORMS = ("rms", "layer")
NORM_POSITIONS = ("before", "after", "both")
QK_NORMS = ("per_head", "all_heads")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
ROPE_SCALINGS = ("linear", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full", "sliding", "no_rope")


_POSITIVE = (
  "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim",
  "max_positions", "norm_epsilon", "query_pre_attn_scalar", "attention_soft_cap",
  "final_soft_cap", "rope_theta", "rope_local_theta", "rope_original_positions",
  "rope_frequency_factors", "rope_short_factors", "rope_long_factors", "rope_magnitude",
  "sliding_window",
)  # fmt: skip
_MOST_COUNTED = 2**31 - 1  # sizes are int32
_MOST_LAYERS = 2**12  # every layer has tensor names; a damaged number must not exhaust memory


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture of a decoder; a field exists only where two families differ or a user sets it.

  Attributes:
    vocab_size: V, number of rows of the embedding, including padding rows.
    d_model: D, width of the residual stream.
    d_ff: F, width of the feed-forward layer.
    num_layers: L, number of layers.
    num_heads: N, number of query heads.
    num_kv_heads: K, number of key and value heads; divides N (Ainslie et al., 2023, GQA).
    head_dim: H, size of a head; not always D / N.
    max_positions: Longest context that the model was trained for, in tokens.
    norm: "rms" (Zhang & Sennrich, 2019) or "layer" (Ba et al., 2016).
    norm_epsilon: Number added to the mean square or variance.
    norm_scale_offset: Number added to the norm's weight before it is applied; 1.0 for Gemma.
    norm_position: Position of the norms: "before" attention and feed-forward layer, "after" both
      (before the residual addition; OLMo 2), or "both" (Gemma 2).
    qk_norm: RMSNorm of queries and keys before the rotary embedding: None, "per_head" (with one
      weight [H] for all heads; Qwen 3), or "all_heads" (of the whole projection; OLMo 2).
    activation: Activation function of the feed-forward layer.
    gated_mlp: Whether the feed-forward layer is down(activation(gate(x)) * up(x)) (Shazeer, 2020)
      instead of down(activation(up(x))).
    parallel_block: Whether a block is x + attention(norm(x)) + mlp(norm(x)) with one norm (GPT-J,
      Phi).
    use_bias: Whether every projection, including the head, has a bias.
    qkv_bias: Whether the projections to queries, keys and values have a bias.
    query_pre_attn_scalar: Scores are divided by the square root of this number; None for head_dim.
    attention_soft_cap: Scores become cap * tanh(scores / cap); None for no cap.
    final_soft_cap: The same for the logits.
    rope_theta: Base of the rotary frequencies (Su et al., 2021).
    rope_local_theta: Base in "sliding" layers, without scaling; None if it is the same in all.
    rope_scaling: How frequencies are scaled to longer contexts; see `ll3m.models.rope`: "linear"
      (Chen et al., 2023), "llama3", "yarn" (Peng et al., 2023) or "longrope" (Ding et al., 2024).
    rope_scaling_factor: Ratio of the longer to the original context; 1.0 for no scaling.
    rope_original_positions: The original context in tokens, for all but "linear".
    rope_frequency_factors: Wavelengths per original context between which "llama3" (low, high) and
      "yarn" (slow, fast) interpolate.
    rope_short_factors: Divisor of each frequency in texts up to the original context, for
      "longrope".
    rope_long_factors: The same in longer texts.
    rope_magnitude: Factor of the rotated queries and keys, for "yarn" and "longrope"; None for that
      of the papers, a function of the scaling factor.
    rotary_fraction: Fraction of head_dim that is rotated.
    sliding_window: Number of keys that a query sees, including its own; None for all up to it.
    layer_types: Types of the layers, repeated up to num_layers: "full", "sliding" (sees only the
      window), or "no_rope" (full, without the rotary embedding). Empty if all layers are alike;
      they then have the window, if there is one.
    tie_embeddings: Whether the head is the transposed embedding.
    scale_embeddings: Whether embeddings are multiplied by sqrt(D), rounded to the compute dtype.
  """

  vocab_size: int
  d_model: int
  d_ff: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_positions: int
  norm_epsilon: float
  norm: str = "rms"
  norm_scale_offset: float = 0.0
  norm_position: str = "before"
  qk_norm: str | None = None
  activation: str = "silu"
  gated_mlp: bool = True
  parallel_block: bool = False
  use_bias: bool = False
  qkv_bias: bool = False
  query_pre_attn_scalar: float | None = None
  attention_soft_cap: float | None = None
  final_soft_cap: float | None = None
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None
  rope_scaling: str = "linear"
  rope_scaling_factor: float = 1.0
  rope_original_positions: int | None = None
  rope_frequency_factors: tuple[float, ...] = ()
  rope_short_factors: tuple[float, ...] = ()
  rope_long_factors: tuple[float, ...] = ()
  rope_magnitude: float | None = None
  rotary_fraction: float = 1.0
  sliding_window: int | None = None
  layer_types: tuple[str, ...] = ()
  tie_embeddings: bool = False
  scale_embeddings: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      check_type(field.name, value)
      numbers = value if isinstance(value, tuple) else (value,)
      # Also true for NaN.
      if any(isinstance(x, float) and not abs(x) < float("inf") for x in numbers):
        raise ValueError(f"{field.name} must be finite, got {value}")
    for name in _POSITIVE:
      value = getattr(self, name)
      if any(x <= 0 for x in (value if isinstance(value, tuple) else (value,)) if x is not None):
        raise ValueError(f"{name} must be positive, got {value}")
      most = _MOST_LAYERS if name == "num_layers" else _MOST_COUNTED
      if isinstance(value, int | float) and value > most:
        raise ValueError(f"{name} must be at most {most}, got {_shown(value)}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
      )
    for name, known in (
      ("norm", NORMS),
      ("norm_position", NORM_POSITIONS),
      ("qk_norm", (None, *QK_NORMS)),
      ("activation", ACTIVATIONS),
      ("rope_scaling", ROPE_SCALINGS),
    ):
      if getattr(self, name) not in known:
        expected = ", ".join(map(str, known))
        raise ValueError(f"{name} must be one of {expected}, got {getattr(self, name)!r}")
    if self.parallel_block and self.norm_position != "before":
      raise ValueError(f"a parallel_block has one norm before it, got {self.norm_position!r}")
    if not 0 < self.rotary_fraction <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
      raise ValueError(
        f"rotary_fraction must rotate an even number of the {self.head_dim} head dimensions, "
        f"got {self.rotary_fraction} ({self.rotary_dim} of them)"
      )
    self._check_rope()
    self._check_layer_types()

  def _check_rope(self) -> None:
    kind, pairs = self.rope_scaling, self.rotary_dim // 2
    if self.rope_scaling_factor < 1:
      raise ValueError(f"rope_scaling_factor must be at least 1, got {self.rope_scaling_factor}")
    if (self.rope_original_positions is None) != (kind == "linear"):
      raise ValueError(
        f"rope_original_positions must be {'None' if kind == 'linear' else 'given'} for {kind} "
        f"scaling, got {self.rope_original_positions}"
      )
    for name, size in (
      ("rope_frequency_factors", 2 if kind in ("llama3", "yarn") else 0),
      ("rope_short_factors", pairs if kind == "longrope" else 0),
      ("rope_long_factors", pairs if kind == "longrope" else 0),
    ):
      if len(getattr(self, name)) != size:
        raise ValueError(
          f"{name} must have {size} numbers for {kind} scaling of {pairs} frequencies, got "
          f"{len(getattr(self, name))}"
        )
    if (
      self.rope_frequency_factors
      and not self.rope_frequency_factors[0] < (self.rope_frequency_factors[1])
    ):
      raise ValueError(
        f"rope_frequency_factors must be increasing, got {self.rope_frequency_factors}"
      )
    if kind != "linear" and (self.rope_original_positions < 2 or self.rope_theta <= 1):
      raise ValueError(
        f"rope_original_positions must be at least 2 and rope_theta above 1 for {kind} scaling, "
        f"got {self.rope_original_positions} and {self.rope_theta}"
      )
    if self.rope_magnitude is not None and kind not in ("yarn", "longrope"):
      raise ValueError(f"rope_magnitude must be None for {kind} scaling")

  def _check_layer_types(self) -> None:
    if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
      raise ValueError(f"layer_types must be of {', '.join(LAYER_TYPES)}, got {', '.join(unknown)}")
    if "sliding" in self.layer_types and self.sliding_window is None:
      raise ValueError("sliding_window must be given for layers of type 'sliding'")
    if not self.layer_types:
      return
    # Equal models have equal configs.
    size = len(self.layer_types)
    types = shortest_cycle([self.layer_types[i % size] for i in range(self.num_layers)])
    if "sliding" not in types:
      object.__setattr__(self, "sliding_window", None)
    object.__setattr__(self, "layer_types", () if types in (("full",), ("sliding",)) else types)

  @property
  def rotary_dim(self) -> int:
    """The number of rotated dimensions of a head."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def pattern(self) -> tuple[LayerKind, ...]:
    """What layers differ in; layer i is of kind pattern[i % len(pattern)]."""
    local = "local" if self.rope_local_theta else "global"
    kinds = {
      "full": LayerKind(None, "global"),
      "sliding": LayerKind(self.sliding_window, local),
      "no_rope": LayerKind(None, None),
    }
    return tuple(kinds[name] for name in self._cycle)

  @property
  def _cycle(self) -> tuple[str, ...]:
    return self.layer_types or ("full" if self.sliding_window is None else "sliding",)

  @property
  def all_layer_types(self) -> tuple[str, ...]:
    """The type of each of the L layers."""
    return tuple(self._cycle[i % len(self._cycle)] for i in range(self.num_layers))

  @property
  def layer_kinds(self) -> tuple[LayerKind, ...]:
    """The kind of each of the L layers."""
    return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

  @property
  def stacks(self) -> tuple[Stack, ...]:
    """The stacks of the layers' parameters; see `layer_stacks.stacks_of`."""
    return stacks_of(self.pattern, self.num_layers)

  def replace(self, **changes: Any) -> "ModelConfig":
    """Returns a validated copy with some fields changed."""
    return dataclasses.replace(self, **_converted(changes))

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as a JSON-serialisable dict."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
    """Builds a config from `to_dict`'s output.

    Raises:
      ValueError: A field is unknown or missing, or a value is invalid.
    """
    _check_names(fields)
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(fields)):
      raise ValueError(f"model config lacks {', '.join(missing)}")
    return cls(**_converted(fields))


def apply_updates(config: ModelConfig, updates: str) -> ModelConfig:
  """Applies `key=value,key=value` to a config.

  Values are Python literals (`None`, `True`, `1e4`) or bare words; nothing is evaluated.

  Raises:
    ValueError: A field is unknown, or a value is invalid.
  """
  changes = {}
  # Commas within parentheses belong to a tuple.
  parts = re.split(r",(?![^(\[]*[)\]])", updates)
  for item in filter(None, (part.strip() for part in parts)):
    name, separator, text = (part.strip() for part in item.partition("="))
    if not separator or not name or not text:
      raise ValueError(f"expected key=value,..., got {item!r}")
    try:
      changes[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      changes[name] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
  _check_names(changes)
  return config.replace(**changes)


def check_type(field: str, value: Any, name: str | None = None) -> None:
  """Checks that a value has the type of a field of `ModelConfig`.

  Args:
    field: Name of the field.
    value: Value for the field.
    name: Name of the value in the error message; the field's name by default.

  Raises:
    ValueError: The value has another type.
  """
  (expected,) = (f.type for f in dataclasses.fields(ModelConfig) if f.name == field)
  if not has_type(value, expected):
    raise ValueError(f"{name or field} must be {type_name(expected)}, got {value!r}")


def did_you_mean(name: str, known: Any) -> str:
  """Returns ' (did you mean X?)' for the closest known name, or ''."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _check_names(fields: dict[str, Any]) -> None:
  known = [f.name for f in dataclasses.fields(ModelConfig)]
  for name in fields:
    if name not in known:
      raise ValueError(f"unknown model config field {name!r}{did_you_mean(name, known)}")


def _converted(fields: dict[str, Any]) -> dict[str, Any]:
  """Turns 10000 into 10000.0 for floats, and JSON's lists into tuples."""
  types = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
  return {name: convert(name, value, types[name]) for name, value in fields.items()}


def _shown(number: float) -> str:
  """Formats a number for a message; hundreds of digits are abbreviated."""
  digits = str(number)
  return digits if len(digits) <= 20 else f"{digits[:6]}... ({len(digits)} digits)"
