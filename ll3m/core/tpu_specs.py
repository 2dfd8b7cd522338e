"""Specifications of TPU generations, for utilisation and for estimates of a step's time."""

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The published figures of one chip.

  Attributes:
    cores: Number of TensorCores. A jax device is one core on some generations, one chip on others.
    peak_flops: Peak bfloat16 FLOP/s of all cores.
    hbm_bytes: Memory that the compiler lets programs use, slightly less than the total.
    hbm_bandwidth: Memory bandwidth in bytes/s.
    link_bandwidth: One-way bandwidth of one link to a neighbouring chip, in bytes/s.
    network_bandwidth: Bandwidth to other slices in bytes/s: the chip's share of its host's network
      cards.
  """

  cores: int
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float


# By jax's device_kind. Sources: each generation's page in Google Cloud's documentation and, for v2
# and v3, Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks", 2020.
# hbm_bytes is the capacity that libtpu 0.0.52's compiler reports when a program is too large.
CHIPS = {
  "TPU v2": Chip(2, 45e12, int(14.96 * GIB), 700e9, 62e9, 3.125e9),
  "TPU v3": Chip(2, 123e12, int(30.96 * GIB), 900e9, 82e9, 3.125e9),
  "TPU v4": Chip(2, 275e12, int(30.50 * GIB), 1228e9, 50e9, 6.25e9),
  "TPU v5 lite": Chip(1, 197e12, int(15.75 * GIB), 819e9, 50e9, 3.125e9),
  "TPU v5": Chip(2, 459e12, int(95.73 * GIB), 2765e9, 100e9, 6.25e9),
  "TPU v6 lite": Chip(1, 918e12, int(31.24 * GIB), 1638e9, 100e9, 12.5e9),
  "TPU7x": Chip(2, 2307e12, int(189.48 * GIB), 7380e9, 100e9, 12.5e9),
}


def of_device(device: Any) -> Chip | None:
  """Returns the figures of one jax device, a share of a chip; None for unknown devices."""
  chip = CHIPS.get(device.device_kind)
  if chip is None:
    return None
  share = device.num_cores / chip.cores
  return Chip(
    cores=device.num_cores,
    peak_flops=chip.peak_flops * share,
    hbm_bytes=int(chip.hbm_bytes * share),
    hbm_bandwidth=chip.hbm_bandwidth * share,
    link_bandwidth=chip.link_bandwidth * share,
    network_bandwidth=chip.network_bandwidth * share,
  )
