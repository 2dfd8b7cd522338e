"""Block sizes written in one line."""

import dataclasses

from ll3m_kernels import BlockSizes


def sizes(*six: int) -> BlockSizes:
  """Returns block sizes, given in the order of the fields of `BlockSizes`."""
  names = (field.name for field in dataclasses.fields(BlockSizes))
  return BlockSizes(**dict(zip(names, six, strict=True)))
