"""Arithmetic of block sizes that the kernels share."""

from ll3m_kernels.dispatch import MIB, Generation

# A vector register holds 8 sublanes of 128 lanes, of 32 bits each.
LANES = 128
SUBLANES = 8


def up(size: int, multiple: int) -> int:
  """Rounds a size up to a multiple."""
  return -(-size // multiple) * multiple


def even(length: int, most: int) -> int:
  """Cuts a length into as few blocks as `most` allows, all of about the same size.

  Returns:
    The blocks' length: the whole, or a multiple of 128.
  """
  count = -(-length // most)
  return length if count == 1 else up(-(-length // count), LANES)


def vmem_limit(needed: int, generation: Generation) -> int:
  """Returns what to ask the compiler for: what is needed and a quarter more, at most all.

  The compiler has been seen to use up to 1.14 of what is counted; what it does not use, its own
  prefetches cannot have either.
  """
  return min(max(16 * MIB, needed * 5 // 4), generation.vmem_bytes)
