"""Block-size arithmetic shared by the kernels."""

from ll3m_kernels.dispatch import MIB, Generation

# A vector register holds 8 sublanes x 128 lanes of 32 bits.
LANES = 128
SUBLANES = 8


def up(size: int, multiple: int) -> int:
  """Rounds a size up to a multiple."""
  return -(-size // multiple) * multiple


def even(length: int, most: int) -> int:
  """Splits a length into as few blocks as `most` allows, all of about the same size.

  Returns:
    The block length: the whole length, or a multiple of 128.
  """
  count = -(-length // most)
  return length if count == 1 else up(-(-length // count), LANES)


def vmem_limit(needed: int, generation: Generation) -> int:
  """Returns a kernel's VMEM limit in bytes: 1.25x the estimate, at least 16 MiB, at most all VMEM.

  The compiler has used up to 1.14x our estimate. A higher limit would only take VMEM away from its
  own prefetching.
  """
  return min(max(16 * MIB, needed * 5 // 4), generation.vmem_bytes)
