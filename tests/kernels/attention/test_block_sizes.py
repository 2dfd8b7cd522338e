"""The default block sizes are valid for every length on every TPU."""

import itertools

import pytest

from ll3m_kernels.attention import block_sizes
from ll3m_kernels.block_arithmetic import LANES
from ll3m_kernels.dispatch import GENERATIONS

LENGTHS = [*range(1, 700, 37), *range(704, 9000, 64), 12_345, 16_384, 20_000, 32_768, 131_072]


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=GENERATIONS)
def test_default_blocks_are_valid_for_every_length(generation):
  for length, head_dim, itemsize, mask in itertools.product(
    LENGTHS, (8, 64, 100, 128, 256), (2, 4), ("causal", "full", "window")
  ):
    problem = block_sizes.Problem(length, length, head_dim, head_dim, itemsize, True, mask)
    chosen = block_sizes.default_blocks(problem, generation)
    block_sizes.check(chosen, problem, generation)
    count = -(-length // chosen.block_q)
    assert count * chosen.block_q - length < max(chosen.block_kv_compute, LANES * count)


def test_default_blocks_are_valid_for_different_lengths_of_queries_and_keys():
  lengths = (1, 100, 200, 500, 1280, 2000, 5000)
  for queries, keys in itertools.product(lengths, lengths):
    problem = block_sizes.Problem(queries, keys, 128, 64, 2, has_segments=False)
    for generation in GENERATIONS.values():
      chosen = block_sizes.default_blocks(problem, generation)
      block_sizes.check(chosen, problem, generation)
      assert chosen.block_q % LANES == 0 or chosen.block_q == queries
      assert chosen.block_kv_compute <= keys
      # The compilers require whole registers of lanes, or the whole length.
      for block_kv in (chosen.block_kv, chosen.block_kv_backward):
        assert block_kv % LANES == 0 or block_kv == keys
