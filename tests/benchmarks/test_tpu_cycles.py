"""The validity of estimates, and the work that rows count."""

import json

import numpy as np
import pytest

from benchmarks import cycle_report
from benchmarks.cycle_rows import Pass, Peer, Row, rows
from benchmarks.tpu_cycles import CyclesConfig, all_tasks, our_task, peer_tasks
from benchmarks.tuning.estimates import CHIPS, Kernel
from ll3m.core import tpu_specs
from ll3m_kernels.dispatch import GENERATIONS

CHIP = CHIPS["v5e"]
# The work of a thousand cycles at peak.
WORK = Pass("forward", slice(None), 1000.0 * CHIP.flops, 8.0, ())


def kernel(cycles, flops=1000.0 * CHIP.flops, follows_data=False):
  return Kernel("kernel", cycles, flops, follows_data)


def judge(*tried, work=WORK, kernels=slice(None), times=1):
  return cycle_report.judge(CHIP, work, tried, kernels, times)


def test_a_valid_estimate():
  assert judge([kernel(1250)]) == cycle_report.Price(1250, 1250)


def test_each_kernel_gets_its_best_block():
  half = 500.0 * CHIP.flops
  price = judge([kernel(900, half), kernel(700, half)], [kernel(800, half), kernel(900, half)])
  assert price.estimate == 1500


def test_only_the_kernels_of_the_pass_are_counted():
  assert judge([kernel(1250), kernel(9000)], kernels=slice(1)).estimate == 1250


def test_an_estimate_of_some_heads_is_multiplied():
  price = judge([kernel(300, 250.0 * CHIP.flops)], times=4)
  assert price.estimate == 1200


@pytest.mark.parametrize(
  "tried, reason",
  [
    ([kernel(999)], "not comparable: 999 cycles are fewer than the peak allows"),
    ([kernel(1250, 999.0 * CHIP.flops)], "not comparable: fewer products"),
    ([kernel(1250, None)], "not comparable: fewer products"),
    ([kernel(1250, follows_data=True)], "not comparable: data decide"),
    ("it aborted", "not priced: it aborted"),
    ([], "not priced: there is no kernel"),
  ],
)
def test_invalid_estimates_are_not_reported(tried, reason):
  price = judge(tried)
  assert f"{price.problem}: {price.reason}".startswith(reason)
  assert price.cycles is None and price.estimate is None


def test_a_kernel_that_aborts_with_one_block_is_priced_with_another():
  assert judge("it aborted", [kernel(1300)]).estimate == 1300


def test_memory_bounds_the_reported_cycles():
  work = Pass("forward", slice(None), 0.0, 2000.0 * CHIP.hbm_bytes, ())
  price = judge([kernel(1500, None)], work=work)
  assert (price.estimate, price.cycles) == (1500, 2000)


def row(name="shape", group="attention"):
  peer = Peer("peer", "jax")
  return Row(group, name, "attention", {}, (WORK._replace(peers=(peer,)),))


def figures(ours, peer):
  return list(cycle_report.figures_of("v5e", row(), ours, {("forward", "peer"): [peer]}))


def test_the_report(tmp_path):
  found = figures([kernel(1250)], [kernel(2500)]) + figures([kernel(10)], "it aborted")
  text = cycle_report.write(found, tmp_path)
  assert "| shape | forward | v5e | 1,250 | 80.0% | 2.00 |" in text
  assert "| shape | forward | v5e | not comparable: 10 cycles" in text
  assert "80.0%" in text and "v5e, peer: it aborted" in text
  assert (tmp_path / "cycles.md").read_text() == text
  written = json.loads((tmp_path / "cycles.json").read_text())
  assert written[0]["share"] == 0.8 and written[0]["peers"]["peer"]["cycles"] == 2500
  assert written[1]["ours"]["problem"] == "not comparable"
  assert (tmp_path / "cycles-v5e.png").read_bytes().startswith(b"\x89PNG")


def test_flops_are_those_of_visible_pairs():
  for found in rows():
    for generation in CHIPS:
      shape = found.on(generation).arguments
      if found.builder != "attention":
        continue
      tokens, window = shape["tokens"], shape.get("window") or shape["tokens"]
      seen = np.arange(1, tokens + 1) if shape["is_causal"] else np.full(tokens, tokens)
      pairs = np.minimum(seen, window).sum()
      expected = 4.0 * pairs * shape["heads"] * shape["head_dim"]
      passes = {part.name: part for part in found.on(generation).passes}
      # Half of all pairs is not exact for a causal mask.
      assert passes["forward"].flops == pytest.approx(expected, rel=1e-3)
      if "forward + backward" in passes:
        assert passes["forward + backward"].flops == pytest.approx(3.5 * expected, rel=1e-3)


def test_peers_do_the_work_of_the_row():
  """The number of priced heads, times the factor of the estimate, is that of the row."""
  for found in rows():
    for generation in CHIPS:
      given = found.on(generation)
      for part in given.passes:
        for peer in part.peers:
          for task in peer_tasks(generation, given, peer):
            if "heads" in given.arguments:
              assert task.arguments["heads"] * peer.times == given.arguments["heads"]
            assert task.arguments["implementation"] != "ours"


def test_row_names_are_unique_and_tasks_include_ours():
  names = [(found.group, found.name) for found in rows()]
  assert len(set(names)) == len(names)
  for found in rows():
    given = found.on("v5e")
    assert our_task("v5e", given).key in {task.key for task in all_tasks("v5e", given)}


def test_quick_selects_fewer_rows_and_generations():
  quick, whole = (CyclesConfig(quick=q).chosen_rows() for q in (True, False))
  assert 3 <= len(quick) < len(whole) == len(list(rows()))
  assert set(CyclesConfig(quick=True).chosen_generations()) == {"v5e", "v6e"}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"generations": "v5e,v9"}, "`generations` expects any of v5e, v5p, v6e, got 'v9'"),
    ({"rows": "("}, "`rows` is not a regular expression"),
    ({"workers": 0}, "`workers` must be at least 1, got 0"),
    ({"seconds": 0.0}, "`seconds` must be positive"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message.replace("(", r"\(")):
    CyclesConfig(**options)


def test_unknown_rows_are_refused():
  with pytest.raises(ValueError, match="`rows` .*'nothing'"):
    CyclesConfig(rows="nothing").chosen_rows()


@pytest.mark.parametrize("generation", CHIPS)
def test_estimates_and_planner_agree_on_the_chips(generation):
  """Compares FLOPs per byte of HBM, which do not depend on the clock rate."""
  published = tpu_specs.CHIPS[GENERATIONS[generation].device_kinds[0]]
  ours = CHIPS[generation]
  expected = published.peak_flops / published.hbm_bandwidth
  assert ours.flops / ours.hbm_bytes == pytest.approx(expected, rel=5e-3)
