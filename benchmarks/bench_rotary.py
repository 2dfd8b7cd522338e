"""Throughput of rotary embeddings, for whole heads and for a part of them (Phi-2)."""

import pytest

from benchmarks import cases
from benchmarks.measuring import PASSES, bench_case

MODELS = ("llama2_7b", "llama2_70b", "open_llama_3b", "smollm2_135m", "gemma_2b", "phi_2")


@pytest.mark.benchmark(group="rotary_embedding")
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("model", MODELS)
def test_rotary(benchmark, model, passes):
  bench_case(benchmark, cases.rotary, model, passes)
