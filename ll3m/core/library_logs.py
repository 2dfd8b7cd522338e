"""The output of libraries' log messages while a command runs."""

import logging as standard_logging
from collections.abc import Iterator
from contextlib import contextmanager

import absl.logging

_PRINTERS = (standard_logging.StreamHandler, absl.logging.ABSLHandler)


@contextmanager
def shown(*, debug: bool) -> Iterator[None]:
  """Prints libraries' warnings as sentences, or with `debug` all messages with their loggers."""
  handler = standard_logging.StreamHandler()
  if debug:
    handler.setFormatter(standard_logging.Formatter(standard_logging.BASIC_FORMAT))
  else:
    handler.setFormatter(_Sentence())
    handler.addFilter(_is_unseen)
  root, verbosity = standard_logging.getLogger(), absl.logging.get_verbosity()
  absl.logging.set_verbosity(absl.logging.INFO if debug else absl.logging.WARNING)
  # The handlers of absl.app and of logging.basicConfig, which some libraries call on import, would
  # print every message a second time.
  others = [other for other in root.handlers if type(other) in _PRINTERS]
  root.handlers = [handler, *(other for other in root.handlers if other not in others)]
  try:
    yield
  finally:
    root.handlers = [*others, *(other for other in root.handlers if other is not handler)]
    absl.logging.set_verbosity(verbosity)


class _Sentence(standard_logging.Formatter):
  """Formatter that prints a record on one line, without location, time or traceback.

  An error that a library logs is printed as a warning, because it does not end the command.
  """

  def format(self, record: standard_logging.LogRecord) -> str:
    level = "warning" if record.levelno >= standard_logging.WARNING else record.levelname.lower()
    return f"{level}: {' '.join(record.getMessage().split())}"


def _is_unseen(record: standard_logging.LogRecord) -> bool:
  """Returns whether no handler of the library itself prints the record, too."""
  logger = standard_logging.getLogger(record.name)
  while logger.parent is not None and not logger.handlers:
    logger = logger.parent
  return logger.parent is None
