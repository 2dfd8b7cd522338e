"""Refuses models whose config.json says that their weights are quantised."""

from collections.abc import Mapping
from typing import Any

# Where a config.json describes how its weights are quantised; the last is MLX's key.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")

WAY_OUT = "convert the unquantised model that it was made from"


def refuse_quantised_config(hf: Mapping[str, Any]) -> None:
  """Raises if a config.json says that its weights are quantised.

  Args:
    hf: The parsed file.

  Raises:
    NotImplementedError: It has one of CONFIG_KEYS, and not null or an empty object.
  """
  for key in CONFIG_KEYS:
    if settings := hf.get(key):
      raise NotImplementedError(
        f"config.json has a {key} (quant_method {_method(settings)}), and quantised weights are "
        f"not supported: {WAY_OUT}; if the weights here are not quantised, remove {key} from "
        f"config.json"
      )


def _method(settings: Any) -> str:
  """Returns how settings name their method, or what their keys tell of it."""
  if not isinstance(settings, Mapping):
    return repr(settings)
  if method := settings.get("quant_method"):
    return repr(method)
  if settings.keys() & {"load_in_4bit", "load_in_8bit"}:
    return "'bitsandbytes'"
  return f"not named; it has {', '.join(sorted(map(str, settings))[:5])}"
