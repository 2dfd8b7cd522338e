"""The rotary parameters of a config.json, in the old and the current spelling."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ll3m.core.model_config import ModelConfig, check_type

# Keys of config.json that this module reads.
KEYS = (
  "rope_theta",
  "partial_rotary_factor",
  "rope_scaling",
  "rope_parameters",
  "rope_local_base_freq",
  "original_max_position_embeddings",
)
_ORIGINAL = "original_max_position_embeddings"
# Keys of an object of parameters: those of every object, and those of each type of scaling.
_COMMON = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
_KEYS_OF_TYPE = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
  "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor"),
  "longrope": ("short_factor", "long_factor", "factor", _ORIGINAL, "attention_factor"),
}
_REQUIRED = {
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
  "yarn": ("factor",),
  "longrope": ("short_factor", "long_factor"),
}
# The objects within `rope_parameters` in files of models with several types of layers.
_NESTED = {"full_attention", "sliding_attention"}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary parameters.

  Attributes:
    fields: Values of the fields of `ModelConfig` whose names begin with "rope_".
    fraction: Rotated fraction of each head; None if the file does not set it.
  """

  fields: Mapping[str, Any]
  fraction: int | float | None


def read_rope(
  hf: Mapping[str, Any], *, theta: float = 10_000.0, local_theta: float | None = None
) -> Rope:
  """Reads the rotary parameters of a config.json.

  Files before 2025 use the object `rope_scaling`, newer ones `rope_parameters`. Both may repeat or
  complete the top-level keys.

  Args:
    hf: The parsed file.
    theta: Base of the frequencies in files that do not set it.
    local_theta: Base in layers with a window; None if the family has the same in all layers.

  Raises:
    ValueError: A value is invalid, or parameters contradict each other.
    NotImplementedError: The type of scaling or a parameter is unknown.
  """
  objects: dict[str, Rope] = {}
  local = {"rope_theta": hf.get("rope_local_base_freq", local_theta)}
  has_local = local_theta is not None
  for name in ("rope_scaling", "rope_parameters"):
    value = hf.get(name)
    if value is not None and not isinstance(value, Mapping):
      raise ValueError(f"{name} of config.json must be an object or null, got {value!r}")
    if not value:
      continue
    if has_local and name == "rope_parameters" and not value.keys() <= _NESTED:
      raise ValueError(
        f"rope_parameters of config.json must be an object for each type of layer "
        f"({', '.join(sorted(_NESTED))}), got {value!r}"
      )
    if value.keys() <= _NESTED:
      for key, parameters in value.items():
        if parameters is not None and not isinstance(parameters, Mapping):
          raise ValueError(
            f"{key} in {name} of config.json must be an object or null, got {parameters!r}"
          )
      full = value.get("full_attention") or {}
      local = value.get("sliding_attention") or (local if has_local else full)
      value = full
      if not has_local and local != value:
        raise NotImplementedError(
          f"{name} of config.json has different parameters for types of layers, which is not "
          f"supported for this family: {value!r} and {local!r}"
        )
    objects[name] = _read_object(name, value, hf, theta)
  found = list(objects.values()) or [_read_object("config.json", {}, hf, theta)]
  if found[0] != found[-1]:
    raise ValueError(
      f"config.json has rope_scaling={hf['rope_scaling']!r} and "
      f"rope_parameters={hf['rope_parameters']!r}, which contradict each other; keep one of them"
    )
  if not has_local:
    return found[0]
  within_name = "rope_parameters.sliding_attention"
  if _kind(within_name, local) != "default":
    raise NotImplementedError(
      f"config.json scales the rotary embedding of layers with a window ({local!r}), which is not "
      f"supported"
    )
  within = _read_object(within_name, local, {}, local_theta)
  return Rope(
    {**found[0].fields, "rope_local_theta": within.fields["rope_theta"]}, found[0].fraction
  )


def to_hf(config: ModelConfig, fraction: float | None) -> dict[str, Any]:
  """Returns the config.json keys in both spellings, which every transformers since 4.38 reads.

  Args:
    config: The architecture.
    fraction: The rotated fraction of each head; None if the family's files do not set it.
  """
  top: dict[str, Any] = {"rope_theta": config.rope_theta}
  if fraction is not None:
    top["partial_rotary_factor"] = fraction
  scaling = _scaling(config)
  old = {"rope_scaling": scaling | {"type": scaling["rope_type"]}} if scaling else {}
  new = (scaling or {"rope_type": "default"}) | top
  if config.rope_local_theta is not None:
    local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
    top["rope_local_base_freq"] = config.rope_local_theta
    new = {"full_attention": new, "sliding_attention": local}
  return top | old | {"rope_parameters": new}


def _scaling(config: ModelConfig) -> dict[str, Any]:
  """Returns the object of parameters without theta and fraction; empty without scaling."""
  kind, factor = config.rope_scaling, config.rope_scaling_factor
  if kind == "linear":
    return {} if factor == 1 else {"rope_type": kind, "factor": factor}
  found: dict[str, Any] = {"rope_type": kind, _ORIGINAL: config.rope_original_positions}
  if kind != "longrope" or factor != _longrope_factor(
    config.max_positions, config.rope_original_positions
  ):
    found["factor"] = factor
  if kind == "llama3":
    found |= zip(
      ("low_freq_factor", "high_freq_factor"), config.rope_frequency_factors, strict=True
    )
  elif kind == "yarn":
    found |= zip(("beta_slow", "beta_fast"), config.rope_frequency_factors, strict=True)
  else:
    found["short_factor"] = list(config.rope_short_factors)
    found["long_factor"] = list(config.rope_long_factors)
  if config.rope_magnitude is not None:
    found["attention_factor"] = config.rope_magnitude
  return found


def _longrope_factor(max_positions: int, original: int) -> float:
  return max(1.0, max_positions / original)


def _read_object(
  name: str, parameters: Mapping[str, Any], hf: Mapping[str, Any], default_theta: float
) -> Rope:
  """Reads an object of parameters and completes it with top-level keys."""
  given = {key: value for key, value in parameters.items() if value is not None}
  kind = _kind(name, given)
  if missing := [key for key in _REQUIRED.get(kind, ()) if key not in given]:
    raise ValueError(f"{name} of config.json has the type {kind!r} but no {missing[0]}")
  if kind == "default" and given.get("factor", 1.0) != 1:
    check_type("rope_scaling_factor", given["factor"], f"factor in {name} of config.json")
    raise NotImplementedError(
      f"{name} of config.json has factor={given['factor']!r} but no type of scaling; add "
      f'"rope_type": "linear" or remove the factor'
    )
  original = hf.get(_ORIGINAL) or given.get(_ORIGINAL) or hf.get("max_position_embeddings")
  known = {*_COMMON, *_KEYS_OF_TYPE[kind], "factor"}
  unknown = [
    f"{key}={value!r}"
    for key, value in given.items()
    if key not in known and (key != _ORIGINAL or value != hf.get("max_position_embeddings"))
  ]
  if unknown:
    raise NotImplementedError(
      f"{name} of config.json has {', '.join(unknown)}, unknown to LL3M, which may change what the "
      f"model computes"
    )
  merged = {key: hf[key] for key in KEYS[:2] if hf.get(key) is not None} | given
  fraction = merged.get("partial_rotary_factor")
  if fraction is not None:
    check_type("rotary_fraction", fraction, "partial_rotary_factor of config.json")
  fields = {"rope_theta": merged.get("rope_theta", default_theta)}
  check_type("rope_theta", fields["rope_theta"], "rope_theta of config.json")
  fields["rope_scaling_factor"] = given.get("factor", 1.0)
  if kind not in ("default", "linear"):
    check_type("rope_original_positions", original, f"{_ORIGINAL} of config.json")
    fields |= {"rope_scaling": kind, "rope_original_positions": original}
  if kind == "llama3":
    fields["rope_frequency_factors"] = [given["low_freq_factor"], given["high_freq_factor"]]
  elif kind == "yarn":
    fields["rope_frequency_factors"] = [given.get("beta_slow", 1.0), given.get("beta_fast", 32.0)]
  elif kind == "longrope":
    longer = _longrope_factor(hf["max_position_embeddings"], original)
    fields["rope_scaling_factor"] = given.get("factor", longer)
    fields["rope_short_factors"] = given["short_factor"]
    fields["rope_long_factors"] = given["long_factor"]
  if "attention_factor" in given:
    fields["rope_magnitude"] = given["attention_factor"]
  for field, value in fields.items():
    check_type(field, value, f"{_NAMES.get(field, field)} in {name} of config.json")
  return Rope(fields, fraction)


# Keys that set the fields of ModelConfig, for messages.
_NAMES = {
  "rope_scaling_factor": "factor",
  "rope_frequency_factors": "the frequency factors",
  "rope_short_factors": "short_factor",
  "rope_long_factors": "long_factor",
  "rope_magnitude": "attention_factor",
}


def _kind(name: str, given: Mapping[str, Any]) -> str:
  """Returns the type of scaling of an object of parameters."""
  kind = given.get("rope_type", given.get("type", "default"))
  if given.get("type", kind) != kind:
    raise ValueError(
      f"{name} of config.json has rope_type={kind!r} and type={given['type']!r}, which contradict "
      f"each other; keep the correct one"
    )
  if kind in ("su", "yarn") and "short_factor" in given:  # Phi-3's first names of longrope
    return "longrope"
  if not isinstance(kind, str) or kind not in _KEYS_OF_TYPE:
    raise NotImplementedError(
      f"config.json has rotary scaling of type {kind!r}; supported are {', '.join(_KEYS_OF_TYPE)}"
    )
  return kind
