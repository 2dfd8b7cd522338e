"""Tables of block sizes: their effect on the kernels, and their errors."""

import dataclasses
import json

import pytest

from ll3m_kernels import block_tables
from ll3m_kernels.attention import block_sizes
from ll3m_kernels.dispatch import GENERATIONS
from ll3m_kernels.norms import block_sizes as norm_blocks
from tests.kernels.attention.sizes import sizes

V5E = GENERATIONS["v5e"]
PROBLEM = block_sizes.Problem(4096, 4096, 128, 128, 2, has_segments=False, mask="full")


@pytest.mark.parametrize(
  "length, bucket", [(1, 1024), (1024, 1024), (1025, 2048), (4096, 4096), (32_768, 4096)]
)
def test_length_bucket(length, bucket):
  assert block_tables.length_bucket(length) == bucket


@pytest.fixture
def mine(tmp_path, monkeypatch):
  """Writes a table for `PROBLEM` and names it in the environment variable."""
  key = block_sizes.key_of(PROBLEM, V5E)
  limits = {
    "block_q": 512,
    "block_kv_compute": 256,
    "block_q_backward": 256,
    "block_kv_compute_backward": 128,
  }
  path = tmp_path / "mine.json"
  block_tables.write(path, {key: {"limits": limits, "cycles": {}}})
  monkeypatch.setenv(block_tables.VARIABLE, str(path))
  return path


def test_a_users_table_overrides_the_rule(mine):
  assert block_sizes.default_blocks(PROBLEM, V5E) == sizes(512, 256, 4096, 256, 128, 4096)
  shorter = block_sizes.Problem(3000, 3000, 128, 128, 2, has_segments=False, mask="full")
  chosen = block_sizes.default_blocks(shorter, V5E)
  assert chosen.block_kv_compute <= 256 and chosen.block_q <= 512, "the same bucket of lengths"


@pytest.mark.parametrize(
  "change",
  [{"mask": "window"}, {"itemsize": 4}, {"queries": 1000, "keys": 1000}, {"head_dim": 72}],
  ids=str,
)
def test_other_problems_use_the_rule(mine, change):
  problem = dataclasses.replace(PROBLEM, **change)
  before = block_sizes.default_blocks(problem, V5E)
  mine.unlink()
  block_tables._entries.cache_clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv(block_tables.VARIABLE)
    assert block_sizes.default_blocks(problem, V5E) == before


def test_limits_that_do_not_fit_still_give_blocks_that_fit(tmp_path, monkeypatch):
  problem = block_sizes.Problem(4096, 4096, 256, 256, 4, has_segments=True, mask="full")
  v4 = GENERATIONS["v4"]
  key = block_sizes.key_of(problem, v4)
  limits = dict.fromkeys(block_sizes.Limits._fields, 4096)
  block_tables.write(tmp_path / "mine.json", {key: {"limits": limits, "cycles": {}}})
  monkeypatch.setenv(block_tables.VARIABLE, str(tmp_path / "mine.json"))
  block_sizes.check(block_sizes.default_blocks(problem, v4), problem, v4)


def test_norms_use_tables_too():
  problem = norm_blocks.Problem(8192, 2048, 2, 3, 1, 1)
  with block_tables.force({"norm_backward": {"block_bytes": 2**19, "tile": 2**16}}):
    chosen = norm_blocks.choose_blocks(problem, V5E)
  assert chosen.rows == 2**19 // 4096 and chosen.tile == 2**16 // 2048


@pytest.mark.parametrize(
  "content",
  ["", "{", "[1]", json.dumps([{"operation": "x"}]), json.dumps([{"limits": 3}])],
  ids=repr,
)
def test_files_that_are_not_tables_raise(tmp_path, monkeypatch, content):
  (tmp_path / "mine.json").write_text(content)
  monkeypatch.setenv(block_tables.VARIABLE, str(tmp_path / "mine.json"))
  with pytest.raises(ValueError, match="mine.json is not a table"):
    block_sizes.default_blocks(PROBLEM, V5E)


def test_a_missing_table_raises(tmp_path, monkeypatch):
  monkeypatch.setenv(block_tables.VARIABLE, str(tmp_path / "none.json"))
  with pytest.raises(ValueError, match="none.json cannot be read"):
    block_sizes.default_blocks(PROBLEM, V5E)


def test_a_table_of_other_limits_is_refused(tmp_path, monkeypatch):
  key = block_sizes.key_of(PROBLEM, V5E)
  block_tables.write(tmp_path / "old.json", {key: {"limits": {"queries": 512}, "cycles": {}}})
  monkeypatch.setenv(block_tables.VARIABLE, str(tmp_path / "old.json"))
  with pytest.raises(ValueError, match=f"{block_tables.VARIABLE}.*limits queries .*block_q"):
    block_sizes.default_blocks(PROBLEM, V5E)
