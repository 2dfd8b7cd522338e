"""Imports TensorFlow and seqio, 3 s of CPU time, with what reads mixtures; see `preloaded`."""

from ll3m.core import stderr

with stderr.tensorflow_import():
  import ll3m.data.seqio_corpus
  import ll3m.data.seqio_tasks  # noqa: F401
