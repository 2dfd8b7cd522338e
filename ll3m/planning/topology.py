"""The devices of TPU machines that are not here, as libtpu's compiler knows them."""

from collections.abc import Sequence

import jax
from jax.experimental import topologies

from ll3m_kernels import tpu_compiler


def devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """Returns the devices of a machine.

  Args:
    topology: generation and chips along each dimension, such as "v5e:8x8" or "v5p:4x4x4".
    num_slices: how many of them, joined by the network of the data center.

  Raises:
    ValueError: there is no such machine, or libtpu is not installed.
  """
  if num_slices < 1:
    raise ValueError(f"--num_slices must be at least 1, got {num_slices}")
  try:
    found = tpu_compiler.devices(topology)  # which also sets up libtpu's environment
    if num_slices > 1:
      described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=num_slices
      )
      found = described.devices
  except (RuntimeError, ImportError) as error:
    raise ValueError(
      f"--topology expects a machine that libtpu knows, such as v5e:8x8, v5p:4x4x4 or v3:4x8, got "
      f"{topology!r}: {error}"
    ) from error
  return found
