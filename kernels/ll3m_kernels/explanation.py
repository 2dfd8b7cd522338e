"""Descriptions of what a call would run, without running it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ll3m_kernels.attention import api as attention
from ll3m_kernels.cross_entropy import api as cross_entropy
from ll3m_kernels.norms import api as norms
from ll3m_kernels.norms import plan as norms_plan
from ll3m_kernels.rotary import api as rotary

# Each public function, and the function that makes its plan from the same arguments.
_PLANS: dict[Callable[..., Any], Callable[..., Any]] = {
  attention.flash_attention: attention.make_plan,
  rotary.rotary_embedding: rotary.make_plan,
  cross_entropy.linear_cross_entropy: cross_entropy.make_plan,
} | {
  function: functools.partial(norms_plan.make_plan, function.__name__)
  for function in (norms.rms_norm, norms.layer_norm, norms.add_rms_norm, norms.add_layer_norm)
}


def explain(operation: str | Callable[..., Any], *args: Any, **options: Any) -> str:
  """Describes which implementation an operation would run, with which blocks, and why.

  The arguments are checked as in the operation itself, with the same errors.

  Args:
    operation: The function, or its name.
    *args: Arguments of the operation: arrays, or anything with a shape and a dtype.
    **options: Keyword arguments of the operation.

  Raises:
    ValueError: The operation is unknown, or an argument is invalid.
    NotImplementedError: The named implementation does not support an argument.
    TypeError: The arguments do not match the operation's signature.
  """
  # Compared by identity, since a different function may have the same name.
  named = {function.__name__: function for function in _PLANS}
  function = named.get(operation) if isinstance(operation, str) else operation
  if function not in named.values():
    raise ValueError(
      f"unknown operation {operation!r}; expected one of {', '.join(named)}, or the function"
    )
  given = inspect.signature(function).bind(*args, **options)
  given.apply_defaults()
  return _PLANS[function](**given.arguments).text
