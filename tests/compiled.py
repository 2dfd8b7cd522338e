"""Runs of the tests take a few steps: what they compile need not be fast, but soon there."""

import tempfile

_folder = tempfile.TemporaryDirectory(prefix="ll3m-compiled-")


def quickly(devices: int = 1) -> dict[str, str]:
  """Environment variables of such a run: half a tiny run's time is compilation otherwise.

  One run finds what another has compiled, and nothing is optimised.

  Args:
    devices: as which the CPU appears.
  """
  unoptimised = "--xla_backend_optimization_level=0"
  return {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {unoptimised}",
    "JAX_COMPILATION_CACHE_DIR": _folder.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
