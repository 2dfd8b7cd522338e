"""Runs of the tests compile the same steps again and again: here they find what one compiled."""

import tempfile

_folder = tempfile.TemporaryDirectory(prefix="ll3m-compiled-")

# Environment variables of such a run, which take a third off a tiny run's time.
COMPILED_ONCE = {
  "JAX_COMPILATION_CACHE_DIR": _folder.name,
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
