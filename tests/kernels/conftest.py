"""Fixtures shared by the tests of the kernels."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
  """Disables the run-time checks of annotations, which only tests enable."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
