"""The pytest configuration of all benchmarks."""

import warnings

import pytest
from pytest_benchmark.logger import PytestBenchmarkWarning


def pytest_configure(config: pytest.Config) -> None:
  """Keeps pytest-benchmark's warnings (of another machine's report, say) from being errors."""
  config.addinivalue_line(
    "filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning"
  )
  warnings.simplefilter("default", PytestBenchmarkWarning)
