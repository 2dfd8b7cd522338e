"""Refuses checkpoints whose weights are quantised, by what their config.json or tensors say."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ll3m.hf.tensors import LazyTensor

# Where a config.json describes how its weights are quantised; the last is MLX's key.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")

_WAY_OUT = "convert the unquantised model that it was made from"

# The names that quantised formats give to tensors beside, or in place of, a weight.
_FORMATS = {
  "GPTQ or AWQ": r".*\.(qweight|qzeros|g_idx)",
  "FP8": r".*\.(weight_scale_inv|weight_scale|input_scale|activation_scale)",
  "compressed-tensors": r".*\.(weight_packed|weight_zero_point|weight_shape|weight_g_idx)",
  "bitsandbytes": r".*\.(SCB|absmax|quant_map|nested_absmax|nested_quant_map|weight_format)"
  r"|.*\.quant_state\..*",
  "MXFP4": r".*_(blocks|scales)",
  "MLX": r".*\.(scales|biases)",
}


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
        f"not supported: {_WAY_OUT}; if the weights here are not quantised, remove {key} from "
        f"config.json"
      )


def refuse_quantised_tensors(tensors: Mapping[str, LazyTensor], origin: str) -> None:
  """Raises if tensors are those of a quantised checkpoint, whatever its config.json says.

  Args:
    tensors: The tensors of a checkpoint, by name.
    origin: The name of the checkpoint in messages.

  Raises:
    NotImplementedError: A tensor has a name of a quantised format, or a weight has one byte a
      value.
  """
  for name, tensor in tensors.items():
    found = next((kind for kind, pattern in _FORMATS.items() if re.fullmatch(pattern, name)), None)
    if found is None and name.endswith("weight") and _is_narrow(tensor.dtype):
      found = "FP8" if tensor.dtype.name.startswith("float8") else "int8"
    if found:
      raise NotImplementedError(
        f"{origin} holds quantised weights ({found}: {name} of {tensor.dtype}), which are not "
        f"supported: {_WAY_OUT}"
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


def _is_narrow(dtype: np.dtype) -> bool:
  return dtype.itemsize == 1 and dtype != np.bool_
