"""Rejects checkpoints whose tensors are in a quantised format."""

import re
from collections.abc import Mapping

import numpy as np

from ll3m.families.quantisation import WAY_OUT
from ll3m.hf.lazy_tensor import LazyTensor

# Names of tensors that quantised formats store beside a weight or in place of it.
_FORMATS = {
  "GPTQ or AWQ": r".*\.(qweight|qzeros|g_idx)",
  "FP8": r".*\.(weight_scale_inv|weight_scale|input_scale|activation_scale)",
  "compressed-tensors": r".*\.(weight_packed|weight_zero_point|weight_shape|weight_g_idx)",
  "bitsandbytes": r".*\.(SCB|absmax|quant_map|nested_absmax|nested_quant_map|weight_format)"
  r"|.*\.quant_state\..*",
  "MXFP4": r".*_(blocks|scales)",
  "MLX": r".*\.(scales|biases)",
}


def refuse_quantised_tensors(tensors: Mapping[str, LazyTensor], origin: str) -> None:
  """Checks that tensors are not quantised, whatever config.json says.

  Args:
    tensors: The tensors of a checkpoint, by name.
    origin: The name of the checkpoint in messages.

  Raises:
    NotImplementedError: A tensor has a name of a quantised format, or a weight has one byte per
      value.
  """
  for name, tensor in tensors.items():
    found = next((kind for kind, pattern in _FORMATS.items() if re.fullmatch(pattern, name)), None)
    if found is None and name.endswith("weight") and _is_narrow(tensor.dtype):
      found = "FP8" if tensor.dtype.name.startswith("float8") else "int8"
    if found:
      raise NotImplementedError(
        f"{origin} holds quantised weights ({found}: {name} of {tensor.dtype}), which are not "
        f"supported: {WAY_OUT}"
      )


def _is_narrow(dtype: np.dtype) -> bool:
  return dtype.itemsize == 1 and dtype != np.bool_
