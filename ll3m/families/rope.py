"""The rotary parameters of a config.json, in the old and the current spelling."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ll3m.core.model_config import check_type

# Keys of config.json that this module reads, and keys of the objects among their values.
KEYS = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")
_NESTED_KEYS = ("rope_theta", "partial_rotary_factor", "rope_type", "type", "factor")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary parameters.

  Attributes:
    theta: Base of the frequencies.
    scaling_factor: Divisor of positions ("linear" scaling).
    fraction: Rotated fraction of each head; None if the file does not set it.
  """

  theta: int | float
  scaling_factor: int | float
  fraction: int | float | None


def read_rope(hf: Mapping[str, Any]) -> Rope:
  """Reads the rotary parameters of a config.json.

  Files before 2025 use the object `rope_scaling`, newer ones `rope_parameters`. Both may repeat or
  complete the top-level keys.

  Args:
    hf: The parsed file.

  Raises:
    ValueError: A value is invalid, or the two objects contradict each other.
    NotImplementedError: The scaling is not linear, or a parameter is unknown.
  """
  objects = {}
  for name in ("rope_scaling", "rope_parameters"):
    value = hf.get(name)
    if value is not None and not isinstance(value, Mapping):
      raise ValueError(f"{name} of config.json must be an object or null, got {value!r}")
    if value:
      objects[name] = _read_object(name, value, hf)
  found = list(objects.values()) or [_read_object("config.json", {}, hf)]
  if found[0] != found[-1]:
    raise ValueError(
      f"config.json has rope_scaling={hf['rope_scaling']!r} and "
      f"rope_parameters={hf['rope_parameters']!r}, which contradict each other; keep one of them"
    )
  return found[0]


def to_hf(rope: Rope) -> dict[str, Any]:
  """Returns the config.json keys in both spellings, which every transformers since 4.38 reads."""
  top: dict[str, Any] = {"rope_theta": rope.theta}
  if rope.fraction is not None:
    top["partial_rotary_factor"] = rope.fraction
  if rope.scaling_factor == 1:
    return top | {"rope_parameters": {"rope_type": "default"} | top}
  scaling = {"rope_type": "linear", "factor": rope.scaling_factor}
  old = scaling | {"type": "linear"}  # the key's name before 2024
  return top | {"rope_scaling": old, "rope_parameters": scaling | top}


def _read_object(name: str, parameters: Mapping[str, Any], hf: Mapping[str, Any]) -> Rope:
  """Reads an object of parameters and completes it with top-level keys."""
  given = {key: value for key, value in parameters.items() if value is not None}
  kind = given.get("rope_type", given.get("type", "default"))
  if given.get("type", kind) != kind:
    raise ValueError(
      f"{name} of config.json has rope_type={kind!r} and type={given['type']!r}, which contradict "
      f"each other; keep the correct one"
    )
  if kind not in ("default", "linear"):
    raise NotImplementedError(
      f"config.json has rotary scaling of type {kind!r}; only 'default' (none) and 'linear' are "
      f"supported"
    )
  if kind == "linear" and "factor" not in given:
    raise ValueError(f"{name} of config.json has the type 'linear' but no factor")
  factor = given.get("factor", 1.0)
  check_type("rope_scaling_factor", factor, f"factor in {name} of config.json")
  if kind == "default" and factor != 1:
    raise NotImplementedError(
      f"{name} of config.json has factor={factor!r} but no type of scaling; add "
      f'"rope_type": "linear" or remove the factor'
    )
  known = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
  unknown = [
    f"{key}={value!r}"
    for key, value in given.items()
    if key not in _NESTED_KEYS and value != known.get(key)
  ]
  if unknown:
    raise NotImplementedError(
      f"{name} of config.json has {', '.join(unknown)}, unknown to LL3M, which may change what the "
      f"model computes"
    )
  merged = {key: hf[key] for key in KEYS[:2] if hf.get(key) is not None} | given
  theta, fraction = merged.get("rope_theta", 10_000.0), merged.get("partial_rotary_factor")
  check_type("rope_theta", theta, "rope_theta of config.json")
  if fraction is not None:
    check_type("rotary_fraction", fraction, "partial_rotary_factor of config.json")
  return Rope(theta, factor, fraction)
