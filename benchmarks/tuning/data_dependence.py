"""Detection of kernels whose control flow depends on the data that they read."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

_READS = ("get", "masked_load")


def kernel_calls(jaxpr: Jaxpr) -> Iterator[Any]:
  """Yields the equations that call Pallas kernels, in order, at any depth."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      # The primitive of a `custom_vjp` holds its jaxpr.
      hidden = getattr(equation.params.get("_prim"), "traced", None)
      for inner in [*jaxprs_in_params(equation.params), *([hidden.jaxpr] if hidden else [])]:
        yield from kernel_calls(_open(inner))


def follows_data(call: Any) -> bool:
  """Returns whether the fetches or the control flow of a kernel depend on data.

  Args:
    call: Equation that calls the kernel.
  """
  if call.params["grid_mapping"].num_index_operands:
    return True
  found = []
  kernel = call.params["jaxpr"]
  _follow(kernel, [False] * len(kernel.invars), lambda: found.append(True))
  return bool(found)


def _follow(jaxpr: Jaxpr, read: Sequence[bool], found: Callable[[], None]) -> list[bool]:
  """Returns which results derive from values that are read from memory.

  Args:
    jaxpr: Instructions of the kernel.
    read: Whether each argument derives from such values.
    found: Callback for each branch or loop that depends on such a value.
  """
  known = dict(zip(jaxpr.invars, read, strict=True))

  def is_read(atom):
    return not isinstance(atom, Literal) and known.get(atom, False)

  for equation in jaxpr.eqns:
    inputs = [is_read(atom) for atom in equation.invars]
    name, params = equation.primitive.name, equation.params
    if name in _READS:
      outputs = [True] * len(equation.outvars)
    elif name == "cond":
      if inputs[0]:
        found()
      branches = [_follow(_open(branch), inputs[1:], found) for branch in params["branches"]]
      outputs = [any(column) for column in zip(*branches, strict=True)]
    elif name == "while":
      outputs = _follow_while(params, inputs, found)
    elif name == "scan":
      outputs = _follow_scan(params, inputs, found)
    else:
      inner = [j for j in jaxprs_in_params(params) if len(j.invars) == len(inputs)]
      if len(inner) == 1 and len(inner[0].outvars) == len(equation.outvars):
        outputs = _follow(inner[0], inputs, found)
      else:
        outputs = [any(inputs)] * len(equation.outvars)
    known.update(zip(equation.outvars, outputs, strict=True))
  return [is_read(atom) for atom in jaxpr.outvars]


def _follow_while(params: Any, inputs: list[bool], found: Callable[[], None]) -> list[bool]:
  condition, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
  split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
  condition_constants, body_constants = inputs[: split[0]], inputs[split[0] : split[1]]
  carry = _until_stable(
    inputs[split[1] :], lambda carry: _follow(body, [*body_constants, *carry], found)
  )
  if any(_follow(condition, [*condition_constants, *carry], found)):
    found()
  return carry


def _follow_scan(params: Any, inputs: list[bool], found: Callable[[], None]) -> list[bool]:
  body = _open(params["jaxpr"])
  constants, carry, sliced = (list(part) for part in params["ft_in"].update(inputs).unpack())
  count = len(carry)

  def step(carry):
    return _follow(body, [*constants, *carry, *sliced], found)

  carry = _until_stable(carry, lambda carry: step(carry)[:count])
  return [*carry, *step(carry)[count:]]


def _until_stable(carry: list[bool], step: Callable[[list[bool]], list[bool]]) -> list[bool]:
  """Repeats a loop's body until no further carried value derives from memory."""
  while True:
    after = [a or b for a, b in zip(carry, step(carry), strict=True)]
    if after == carry:
      return carry
    carry = after


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
  return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
