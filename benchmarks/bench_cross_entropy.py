"""Throughput of the loss of a linear head: both layouts, a bias, a small and a large vocabulary."""

import pytest

from benchmarks import cases
from benchmarks.measuring import PASSES, bench_case

MODELS = ("llama2_7b", "smollm2_135m", "gemma_2b", "phi_2")


@pytest.mark.benchmark(group="linear_cross_entropy")
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("model", MODELS)
def test_cross_entropy(benchmark, model, passes):
  bench_case(benchmark, cases.cross_entropy, model, passes)
