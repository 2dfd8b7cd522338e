"""Fixtures of all tests of the kernels."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
  """Switches off the run-time checks of annotations that only tests have."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
