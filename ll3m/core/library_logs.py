"""What libraries log while a command runs, as the person who typed should see it."""

import logging as standard_logging
from collections.abc import Iterator
from contextlib import contextmanager

import absl.logging

_PRINTERS = (standard_logging.StreamHandler, absl.logging.ABSLHandler)


@contextmanager
def shown(*, debug: bool) -> Iterator[None]:
  """Shows what libraries log: warnings as sentences, or with `debug` everything with its place."""
  handler = standard_logging.StreamHandler()
  if debug:
    handler.setFormatter(standard_logging.Formatter(standard_logging.BASIC_FORMAT))
  else:
    handler.setFormatter(_Sentence())
    handler.addFilter(_is_unseen)
  root, verbosity = standard_logging.getLogger(), absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.INFO if debug else absl.logging.WARNING)
  # The handlers of absl.app and of logging.basicConfig, which some library calls while it is
  # imported, would print everything once more.
  others = [other for other in root.handlers if type(other) in _PRINTERS]
  root.handlers = [handler, *(other for other in root.handlers if other not in others)]
  try:
    yield
  finally:
    root.handlers = [*others, *(other for other in root.handlers if other is not handler)]
    absl.logging.set_verbosity(verbosity)


class _Sentence(standard_logging.Formatter):
  """Formats a record as errors are printed, on one line and without its place, time or traceback.

  What a library logs as an error is a warning: an error of ours ends the command.
  """

  def format(self, record: standard_logging.LogRecord) -> str:
    level = "warning" if record.levelno >= standard_logging.WARNING else record.levelname.lower()
    return f"{level}: {' '.join(record.getMessage().split())}"


def _is_unseen(record: standard_logging.LogRecord) -> bool:
  """Whether no handler of the library itself prints the record too."""
  logger = standard_logging.getLogger(record.name)
  while logger.parent is not None and not logger.handlers:
    logger = logger.parent
  return logger.parent is None
