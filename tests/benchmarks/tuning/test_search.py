"""The search on known costs, compared with an exhaustive search."""

import itertools

import pytest

from benchmarks.tuning.cache import Ledger
from benchmarks.tuning.estimates import Kernel
from benchmarks.tuning.search import Search
from benchmarks.tuning.search_space import OPERATIONS, Shape
from ll3m_kernels.dispatch import GENERATIONS

SHAPE = Shape(128, 4096, "causal")
ATTENTION = OPERATIONS["flash_attention"]


class Costs(Ledger):
  """A fake ledger that computes cycles by a formula and records its requests."""

  def __init__(self, cycles):
    self.cycles, self.asked = cycles, []

  def run(self, tasks, *, workers, seconds):
    for task in reversed(tasks):  # in order of completion, not of the requests
      self.asked.append(task.arguments)
      result = self.cycles(task.arguments["kernel"], task.arguments["limits"])
      yield task, result if isinstance(result, str) else [Kernel("k", result, None, False)]


def search(cycles):
  costs = Costs(cycles)
  reports = []
  found = Search(costs, workers=1, seconds=1.0, report=lambda: reports.append(1)).run(
    "flash_attention", "v5e", SHAPE
  )
  assert len(reports) == len(costs.asked)
  return found, costs.asked


def distance(kernel, limits, forward=(512, 4096), backward=(256, 1024)):
  """Returns cycles with one minimum, whose coordinates can be found one by one."""
  names, best = (
    (("block_kv_compute", "block_q"), forward)
    if kernel == "attention_forward"
    else (("block_kv_compute_backward", "block_q_backward"), backward)
  )
  return 1000 + sum(abs(limits[n] - b) for n, b in zip(names, best, strict=True))


def test_the_minimum_is_found():
  found, _ = search(distance)
  assert found.limits == {
    "block_kv_compute": 512,
    "block_q": 4096,
    "block_kv_compute_backward": 256,
    "block_q_backward": 1024,
  }
  for kernel, options in ATTENTION.options.items():
    every = [
      distance(kernel, found.limits | dict(zip(options, values, strict=True)))
      for values in itertools.product(*options.values())
    ]
    assert found.cycles[kernel]["tuned"] == min(every)
    rule = ATTENTION.rule(SHAPE, GENERATIONS["v5e"])._asdict()
    assert found.cycles[kernel]["rule"] == distance(kernel, rule)
  assert found.key.length == 4096 and found.key.mask == "causal" and found.key.size == 128


def test_the_rule_is_kept_if_nothing_is_better():
  found, asked = search(lambda kernel, limits: 1000)
  assert found.limits == ATTENTION.rule(SHAPE, GENERATIONS["v5e"])._asdict()
  assert all(c["tuned"] == c["rule"] for c in found.cycles.values())
  assert len({str(a) for a in asked}) == len(asked), "nothing is requested twice"


def test_small_gains_are_ignored():
  """One pass gains a thousandth, the other a tenth."""

  def cycles(kernel, limits):
    if kernel == "attention_forward":
      return 999 if limits["block_q"] == 512 else 1000
    return 900 if limits["block_kv_compute_backward"] == 256 else 1000

  found, _ = search(cycles)
  rule = ATTENTION.rule(SHAPE, GENERATIONS["v5e"])._asdict()
  assert found.limits == rule | {"block_kv_compute_backward": 256}
  assert found.cycles == {
    "attention_forward": {"tuned": 1000, "rule": 1000},
    "attention_backward": {"tuned": 900, "rule": 1000},
  }


def test_limits_that_cannot_be_priced_are_skipped_and_reported():
  def cycles(kernel, limits):
    return "the profile aborted" if limits["block_kv_compute"] == 512 else distance(kernel, limits)

  found, _ = search(cycles)
  assert found.limits["block_kv_compute"] == 256
  assert found.failures and all("the profile aborted" in text for text in found.failures)


def test_a_rule_that_cannot_be_priced_raises():
  with pytest.raises(RuntimeError, match="cannot be priced: out of luck"):
    search(lambda kernel, limits: "out of luck")
