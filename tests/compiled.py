"""Settings for short compilation: test runs take few steps, so programs need not be fast."""

import tempfile

_folder = tempfile.TemporaryDirectory(prefix="ll3m-compiled-")


def quickly(devices: int = 1) -> dict[str, str]:
  """Returns environment variables for unoptimised compilation with a cache shared by all runs.

  Compilation otherwise takes 0.4 of a tiny run's time.

  Args:
    devices: Number of devices that the CPU is split into.
  """
  unoptimised = "--xla_backend_optimization_level=0"
  return {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {unoptimised}",
    "JAX_COMPILATION_CACHE_DIR": _folder.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
