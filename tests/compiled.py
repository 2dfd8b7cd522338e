"""Runs of the tests take a few steps: what they compile need not be fast, but soon there."""

import tempfile

_folder = tempfile.TemporaryDirectory(prefix="ll3m-compiled-")


def quickly(devices: int = 1) -> dict[str, str]:
  """Environment variables of such a run: one finds what another has compiled, unoptimised.

  Compiling takes 0.4 of a tiny run's time otherwise.

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
