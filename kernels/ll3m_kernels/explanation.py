"""Says what a call would run, without running it."""

from collections.abc import Callable
from typing import Any

from ll3m_kernels.attention import api as attention
from ll3m_kernels.cross_entropy import api as cross_entropy
from ll3m_kernels.norms import api as norms
from ll3m_kernels.rotary import api as rotary

_EXPLAIN: dict[str, Callable[..., str]] = {
  "flash_attention": attention.explain,
  "rotary_embedding": rotary.explain,
  "linear_cross_entropy": cross_entropy.explain,
  **{
    name: lambda *args, _name=name, **options: norms.explain(_name, *args, **options)
    for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
  },
}


def explain(operation: str | Callable[..., Any], *args: Any, **options: Any) -> str:
  """Says which implementation an operation would run, with which blocks, and why.

  Args:
    operation: the function, or its name.
    *args: what it would be called with: arrays, or anything with a shape and a dtype.
    **options: its keyword arguments.

  Raises:
    ValueError: no such operation, or arguments that do not fit it.
    NotImplementedError: the named implementation cannot serve an argument.
  """
  name = operation if isinstance(operation, str) else operation.__name__
  if name not in _EXPLAIN:
    raise ValueError(f"unknown operation {name!r}; expected one of {', '.join(_EXPLAIN)}")
  return _EXPLAIN[name](*args, **options)
