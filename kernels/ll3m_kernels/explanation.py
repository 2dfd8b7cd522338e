"""Says what a call would run, without running it."""

from collections.abc import Callable
from typing import Any

from ll3m_kernels.attention import api as attention
from ll3m_kernels.cross_entropy import api as cross_entropy
from ll3m_kernels.norms import api as norms
from ll3m_kernels.rotary import api as rotary

_OPERATIONS: dict[str, Callable[..., Any]] = {
  "flash_attention": attention.flash_attention,
  "rms_norm": norms.rms_norm,
  "layer_norm": norms.layer_norm,
  "add_rms_norm": norms.add_rms_norm,
  "add_layer_norm": norms.add_layer_norm,
  "rotary_embedding": rotary.rotary_embedding,
  "linear_cross_entropy": cross_entropy.linear_cross_entropy,
}
_EXPLAIN: dict[str, Callable[..., str]] = {
  "flash_attention": attention.explain,
  "rotary_embedding": rotary.explain,
  "linear_cross_entropy": cross_entropy.explain,
}


def explain(operation: str | Callable[..., Any], *args: Any, **options: Any) -> str:
  """Says which implementation an operation would run, with which blocks, and why.

  It checks the arguments as the operation does, and refuses what that refuses.

  Args:
    operation: the function, or its name.
    *args: what it would be called with: arrays, or anything with a shape and a dtype.
    **options: its keyword arguments.

  Raises:
    ValueError: no such operation, or arguments that do not fit it.
    NotImplementedError: the named implementation cannot serve an argument.
    TypeError: arguments that it does not take, or too few.
  """
  for name, function in _OPERATIONS.items():
    # By identity: another function of the same name is another function.
    if operation is function or (isinstance(operation, str) and operation == name):
      break
  else:
    raise ValueError(
      f"unknown operation {operation!r}; expected one of {', '.join(_OPERATIONS)}, or the function"
    )
  if name in _EXPLAIN:
    return _EXPLAIN[name](*args, **options)
  return norms.explain(name, *args, **options)
