"""Fixtures of the rotary-embedding tests."""

import functools

import jax
import pytest
from jax.experimental import pallas as pl


@pytest.fixture
def interpreted(monkeypatch):
  """Plain interpret mode: jax's TPU interpreter supports neither vmap nor checkpoint."""
  monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@pytest.fixture
def retraced():
  """Traces anew: otherwise jax uses what it traced for the same arrays with other constants."""
  jax.clear_caches()
  yield
  jax.clear_caches()
