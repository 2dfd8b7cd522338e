"""Rejects models whose config.json declares quantised weights."""

from collections.abc import Mapping
from typing import Any

# Keys of config.json that describe how weights are quantised; the last one is MLX's.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")

WAY_OUT = "convert the unquantised original"


def refuse_quantised_config(hf: Mapping[str, Any]) -> None:
  """Checks that a config.json does not declare quantised weights.

  Args:
    hf: The parsed file.

  Raises:
    NotImplementedError: One of CONFIG_KEYS is neither null nor an empty object.
  """
  for key in CONFIG_KEYS:
    if settings := hf.get(key):
      raise NotImplementedError(
        f"config.json has a {key} (quant_method {_method(settings)}), but quantised weights are "
        f"not supported: {WAY_OUT}, or, if the weights are not quantised, remove {key} from "
        f"config.json"
      )


def _method(settings: Any) -> str:
  """Returns the name of the quantisation method, or the settings' keys if it is missing."""
  if not isinstance(settings, Mapping):
    return repr(settings)
  if method := settings.get("quant_method"):
    return repr(method)
  if settings.keys() & {"load_in_4bit", "load_in_8bit"}:
    return "'bitsandbytes'"
  return f"not named; it has {', '.join(sorted(map(str, settings))[:5])}"
