"""Throughput of the norms, alone and with the residual addition."""

import pytest

from benchmarks import cases
from benchmarks.measuring import PASSES, bench_case

# Phi-2 has LayerNorm, the others RMSNorm.
MODELS = ("llama2_7b", "llama2_70b", "open_llama_3b", "smollm2_135m", "gemma_2b", "phi_2")


@pytest.mark.benchmark(group="rms_norm and layer_norm")
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("model", MODELS)
def test_norm(benchmark, model, passes):
  bench_case(benchmark, cases.norm, model, passes)


@pytest.mark.benchmark(group="add_rms_norm and add_layer_norm")
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("model", MODELS)
def test_add_norm(benchmark, model, passes):
  bench_case(benchmark, cases.norm, model, passes, adds=True)
