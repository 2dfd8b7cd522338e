"""A plan as a human-readable table."""

import textwrap
from collections.abc import Iterator

from ll3m.core.tpu_specs import GIB
from ll3m.planning.program_plan import Plan

_COLUMNS = 80
_MOST_COLLECTIVES = 12


def table(plan: Plan) -> str:
  """Returns a plan as lines of text."""
  return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
  for name, text in plan.subject:
    yield f"{name:12}{text}"
  yield ""
  yield "memory per chip, GiB"
  for name, nbytes in plan.bytes_per_chip.items():
    yield f"  {name:<22}{nbytes / GIB:>10.2f}"
  yield f"  {'of':<22}{plan.hbm_bytes / GIB:>10.2f}"
  if not plan.fits:
    yield f"does not fit{f': {plan.advice}' if plan.advice else ''}"
    yield from _largest(plan)
    return
  yield "fits"
  yield from _largest(plan)
  yield ""
  kernels = ", ".join(plan.kernels) or f"none: {plan.why_no_kernels}"
  yield textwrap.fill(f"{'kernels':12}{kernels}", _COLUMNS, subsequent_indent=" " * 12)
  yield f"{'compiled in':12}{plan.compile_seconds:.0f} s"
  yield f"{'FLOPs':12}{plan.flops:.3g} per step"
  yield ""
  yield f"{'sent per chip and step':24}{'along':18}{'MB':>10}"
  for collective in plan.collectives[:_MOST_COLLECTIVES]:
    along = collective.axis + (" (network)" if collective.between_slices else "")
    yield f"  {collective.kind:22}{along:18}{collective.bytes / 1e6:>10,.1f}"
  yield ""
  yield "lower bounds on a step, seconds"
  for name, seconds in plan.step_seconds.items():
    yield f"  {name:<22}{seconds:>10.4f}"
  bound = max(plan.step_seconds, key=plan.step_seconds.get)
  yield (
    f"at best {plan.tokens_per_second:,.0f} tokens/s, bound by {bound}"
    + (f"; {plan.mfu:.1%} of the peak" if plan.mfu is not None else "")
  )


def _largest(plan: Plan) -> Iterator[str]:
  if plan.largest_batch is not None:
    yield f"largest batch_size that fits: {plan.largest_batch}"
