"""Estimates by the real compiler: their counts and their errors."""

import pytest

from benchmarks.tuning.estimates import CHIPS, NotPricedError, UnfinishedError, estimate
from tests.benchmarks.tuning.builders import K, M, N

BUILDERS = "tests.benchmarks.tuning.builders"


@pytest.mark.parametrize("generation", CHIPS)
def test_products_are_counted(generation):
  (kernel,) = estimate(generation, f"{BUILDERS}:product", {}, count_products=True)
  assert kernel.name == "product"
  assert not kernel.follows_data
  # The dimensions fill the matrix units of all generations, so no product is wasted. One core runs
  # the whole grid, which is not parallel.
  assert kernel.product_flops == 2 * M * K * N
  flops = CHIPS[generation].flops / (2 if generation == "v5p" else 1)
  assert 2 * M * K * N / flops < kernel.cycles < 20 * 2 * M * K * N / flops


def test_a_whole_program_is_priced():
  (program,) = estimate("v5e", f"{BUILDERS}:product", {}, count_products=True, whole_program=True)
  (kernel,) = estimate("v5e", f"{BUILDERS}:product", {})
  assert program.name == "program"
  assert program.product_flops == 2 * M * K * N
  assert program.cycles == pytest.approx(kernel.cycles, rel=0.5)  # its operands may be prefetched


def test_kernels_that_follow_data_are_reported():
  (kernel,) = estimate("v5e", f"{BUILDERS}:loop_over_data", {})
  assert kernel.follows_data


def test_overwritten_operands_are_not_copied():
  # There is no memory for a copy, with which the kernel could not be priced.
  (kernel,) = estimate("v5p", f"{BUILDERS}:in_place", {})
  assert kernel.name == "kernel"


def test_errors_of_the_builder_are_reported():
  with pytest.raises(NotPricedError, match="NotImplementedError: there is no such kernel"):
    estimate("v5e", f"{BUILDERS}:refused", {})


def test_estimates_have_a_time_limit():
  with pytest.raises(UnfinishedError, match="no estimate within 0.1 s"):
    estimate("v5e", f"{BUILDERS}:product", {}, seconds=0.1)


def test_other_generations_are_refused():
  with pytest.raises(ValueError, match="generation .* v5e, v5p, v6e, got 'v4'"):
    estimate("v4", f"{BUILDERS}:product", {})
