"""Devices of TPU machines that are not available here, as libtpu's compiler describes them."""

from collections.abc import Sequence

import jax

from ll3m_kernels import tpu_compiler


def devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """Returns the devices of a machine.

  Args:
    topology: Generation and chips along each dimension, such as "v5e:8x8" or "v5p:4x4x4".
    num_slices: Number of such machines, joined by the data center's network.

  Raises:
    ValueError: The machine is unknown to libtpu, or libtpu is not installed.
  """
  if num_slices < 1:
    raise ValueError(f"`num_slices` must be at least 1, got {num_slices}")
  try:
    return tpu_compiler.devices(topology, num_slices)
  except (RuntimeError, ImportError) as error:
    raise ValueError(
      f"`topology` expects a machine that libtpu knows, such as v5e:8x8, v5p:4x4x4 or v3:4x8, got "
      f"{topology!r}: {error}"
    ) from error
