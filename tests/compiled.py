"""Settings for short compilation: tests run their programs only a few times."""

import os
import tempfile

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_folder = None if _CACHE in os.environ else tempfile.TemporaryDirectory(prefix="ll3m-compiled-")


def cache() -> dict[str, str]:
  """Returns environment variables for jax's compilation cache, one for all processes of a test run.

  Many tests compile the same tiny models: it saves a sixth of the time of tests that train.
  """
  return {
    _CACHE: os.environ[_CACHE] if _folder is None else _folder.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def quickly(devices: int = 1) -> dict[str, str]:
  """Returns environment variables for unoptimised compilation with that cache.

  Compilation otherwise takes 0.4 of a tiny run's time.

  Args:
    devices: Number of devices that the CPU is split into.
  """
  unoptimised = "--xla_backend_optimization_level=0"
  return cache() | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {unoptimised}"}
