"""Throughput of attention: grouped, single and many KV heads, odd head dims, a window."""

import pytest

from benchmarks import cases
from benchmarks.measuring import PASSES, bench_case

MODELS = (
  "llama2_7b", "llama2_70b", "open_llama_3b", "tiny_llama_1b", "smollm2_135m", "mistral_7b",
  "gemma_2b", "phi_2",
)  # fmt: skip


@pytest.mark.benchmark(group="flash_attention, causal")
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("model", MODELS)
def test_causal(benchmark, model, passes):
  bench_case(benchmark, cases.attention, model, passes)


@pytest.mark.benchmark(group="flash_attention, full")
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("model", ["llama2_7b"])
def test_full(benchmark, model, passes):
  bench_case(benchmark, cases.attention, model, passes, is_causal=False)
