"""The rotary parameters of a config.json, in the spellings of 2023 and of today."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ll3m.core.model_config import check_type

# The keys of config.json that are read here, and the ones of the objects among them.
KEYS = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")
_NESTED_KEYS = ("rope_theta", "partial_rotary_factor", "rope_type", "type", "factor")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary parameters.

  Attributes:
    theta: Base of the frequencies.
    scaling_factor: Factor that positions are divided by ("linear" scaling).
    fraction: Share of a head that is rotated; None if the file does not say.
  """

  theta: int | float
  scaling_factor: int | float
  fraction: int | float | None


def read_rope(hf: Mapping[str, Any]) -> Rope:
  """Reads the rotary parameters of a config.json.

  `rope_scaling` is the object of files before 2025 and `rope_parameters` that of today; either may
  repeat, or complete, what stands at the top.

  Args:
    hf: The parsed file.

  Raises:
    ValueError: A value makes no sense, or the two objects contradict each other.
    NotImplementedError: Scaling of another kind than linear, or a parameter that is not known.
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
      f"rope_parameters={hf['rope_parameters']!r}, which contradict each other; keep the right one"
    )
  return found[0]


def to_hf(rope: Rope) -> dict[str, Any]:
  """Returns keys of config.json in both spellings, which every transformers since 4.38 reads."""
  top: dict[str, Any] = {"rope_theta": rope.theta}
  if rope.fraction is not None:
    top["partial_rotary_factor"] = rope.fraction
  if rope.scaling_factor == 1:
    return top | {"rope_parameters": {"rope_type": "default"} | top}
  scaling = {"rope_type": "linear", "factor": rope.scaling_factor}
  old = scaling | {"type": "linear"}  # the key's name before 2024
  return top | {"rope_scaling": old, "rope_parameters": scaling | top}


def _read_object(name: str, parameters: Mapping[str, Any], hf: Mapping[str, Any]) -> Rope:
  """Reads one object of parameters, completed from the top of the file."""
  given = {key: value for key, value in parameters.items() if value is not None}
  kind = given.get("rope_type", given.get("type", "default"))
  if given.get("type", kind) != kind:
    raise ValueError(
      f"{name} of config.json has rope_type={kind!r} and type={given['type']!r}, which contradict "
      f"each other; keep the right one"
    )
  if kind not in ("default", "linear"):
    raise NotImplementedError(
      f"config.json asks for rotary scaling of type {kind!r}; only 'default' (none) and 'linear' "
      f"are supported"
    )
  if kind == "linear" and "factor" not in given:
    raise ValueError(f"{name} of config.json has the type 'linear' and no factor")
  factor = given.get("factor", 1.0)
  check_type("rope_scaling_factor", factor, f"factor in {name} of config.json")
  if kind == "default" and factor != 1:
    raise NotImplementedError(
      f"{name} of config.json has factor={factor!r} and no type of scaling; add "
      f'"rope_type": "linear" if that is what is meant, or remove the factor'
    )
  known = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
  unknown = [
    f"{key}={value!r}"
    for key, value in given.items()
    if key not in _NESTED_KEYS and value != known.get(key)
  ]
  if unknown:
    raise NotImplementedError(
      f"{name} of config.json has {', '.join(unknown)}, not known to ll3m: what the model computes "
      f"may depend on it"
    )
  merged = {key: hf[key] for key in KEYS[:2] if hf.get(key) is not None} | given
  theta, fraction = merged.get("rope_theta", 10_000.0), merged.get("partial_rotary_factor")
  check_type("rope_theta", theta, "rope_theta of config.json")
  if fraction is not None:
    check_type("rotary_fraction", fraction, "partial_rotary_factor of config.json")
  return Rope(theta, factor, fraction)
