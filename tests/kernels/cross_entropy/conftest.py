"""Fixtures of the cross-entropy tests."""

import pytest

from ll3m_kernels.cross_entropy import xla


@pytest.fixture
def narrow_chunks(monkeypatch):
  """Limits chunks to 256 columns, so that small vocabularies have several."""
  monkeypatch.setattr(xla, "_MOST_COLUMNS", 256)
