"""The architecture of a decoder-only transformer: sizes, and switches in which families differ."""

import ast
import dataclasses
import difflib
from typing import Any

NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


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
    activation: Activation function of the feed-forward layer.
    gated_mlp: Whether the feed-forward layer is down(activation(gate(x)) * up(x)) (Shazeer, 2020)
      instead of down(activation(up(x))).
    parallel_block: Whether a block is x + attention(norm(x)) + mlp(norm(x)) with one norm (GPT-J,
      Phi).
    use_bias: Whether every projection, including the head, has a bias.
    rope_theta: Base of the rotary frequencies (Su et al., 2021).
    rope_scaling_factor: Divisor of the positions (Chen et al., 2023, position interpolation).
    rotary_fraction: Fraction of head_dim that is rotated.
    sliding_window: Number of keys that a query sees, including its own; None for all up to it.
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
  activation: str = "silu"
  gated_mlp: bool = True
  parallel_block: bool = False
  use_bias: bool = False
  rope_theta: float = 10_000.0
  rope_scaling_factor: float = 1.0
  rotary_fraction: float = 1.0
  sliding_window: int | None = None
  tie_embeddings: bool = False
  scale_embeddings: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      check_type(field.name, value)
      if field.type is float and not abs(value) < float("inf"):  # also true for NaN
        raise ValueError(f"{field.name} must be finite, got {value}")
    for name in (
      "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim",
      "max_positions", "norm_epsilon", "rope_theta",
    ):  # fmt: skip
      if getattr(self, name) <= 0:
        raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
      most = _MOST_LAYERS if name == "num_layers" else _MOST_COUNTED
      if getattr(self, name) > most:
        raise ValueError(f"{name} must be at most {most}, got {_shown(getattr(self, name))}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
      )
    if self.norm not in NORMS:
      raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
      )
    if not 0 < self.rotary_fraction <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
      raise ValueError(
        f"rotary_fraction must rotate an even number of the {self.head_dim} head dimensions, "
        f"got {self.rotary_fraction} ({self.rotary_dim} of them)"
      )
    if self.rope_scaling_factor < 1:
      raise ValueError(f"rope_scaling_factor must be at least 1, got {self.rope_scaling_factor}")
    if self.sliding_window is not None and self.sliding_window < 1:
      raise ValueError(f"sliding_window must be at least 1, got {self.sliding_window}")

  @property
  def rotary_dim(self) -> int:
    """The number of rotated dimensions of a head."""
    return int(self.head_dim * self.rotary_fraction)

  def replace(self, **changes: Any) -> "ModelConfig":
    """Returns a validated copy with some fields changed."""
    return dataclasses.replace(self, **_whole_numbers_as_floats(changes))

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
    return cls(**_whole_numbers_as_floats(fields))


def apply_updates(config: ModelConfig, updates: str) -> ModelConfig:
  """Applies `key=value,key=value` to a config.

  Values are Python literals (`None`, `True`, `1e4`) or bare words; nothing is evaluated.

  Raises:
    ValueError: A field is unknown, or a value is invalid.
  """
  changes = {}
  for item in filter(None, (part.strip() for part in updates.split(","))):
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
  # JSON files and users write 10000 for a float.
  if not _has_type(value, expected) and not (expected is float and type(value) is int):
    raise ValueError(f"{name or field} must be {_type_name(expected)}, got {value!r}")


def did_you_mean(name: str, known: Any) -> str:
  """Returns ' (did you mean X?)' for the closest known name, or ''."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _check_names(fields: dict[str, Any]) -> None:
  known = [f.name for f in dataclasses.fields(ModelConfig)]
  for name in fields:
    if name not in known:
      raise ValueError(f"unknown model config field {name!r}{did_you_mean(name, known)}")


def _whole_numbers_as_floats(fields: dict[str, Any]) -> dict[str, Any]:
  """Turns 10000 into 10000.0 for float fields: JSON files and users write both."""
  floats = {f.name for f in dataclasses.fields(ModelConfig) if f.type is float}
  converted = {}
  for name, value in fields.items():
    try:
      converted[name] = float(value) if name in floats and type(value) is int else value
    except OverflowError:
      raise ValueError(
        f"{name} must be finite, got a number of {len(hex(value)) * 4} bits"
      ) from None
  return converted


def _has_type(value: Any, expected: Any) -> bool:
  if expected is bool or expected is str:
    return isinstance(value, expected)
  if isinstance(value, bool):
    return False
  return isinstance(value, expected)


def _type_name(expected: Any) -> str:
  return getattr(expected, "__name__", str(expected))


def _shown(number: float) -> str:
  """Formats a number for a message; hundreds of digits are abbreviated."""
  digits = str(number)
  return digits if len(digits) <= 20 else f"{digits[:6]}... ({len(digits)} digits)"
