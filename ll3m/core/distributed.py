"""The processes of one run on several hosts: they come together, and end together.

jax.distributed connects the devices. What it does not do is say who is missing: a process that does
not come, or dies, makes the others abort with a C++ stack trace or wait for ever in a collective.
So every process also has a line to process 0, on which they watch each other (see `peer_watch`).
"""

import contextlib
import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from ll3m.core import options
from ll3m.core.peer_watch import connect, open_port

# Options that have to differ between processes.
_OWN = ("jax_distributed.process_id",)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """How the processes of a run find each other."""

  coordinator_address: str | None = options.option(
    None,
    "HOST:PORT at which process 0 listens, for a run of several processes; it uses the next port "
    "too.",
  )
  num_processes: int | None = options.option(None, "How many processes the run has.")
  process_id: int | None = options.option(None, "Which of them this is, from 0.")
  auto: bool = options.option(
    False, "Find these three out from the TPU's or the cluster's environment."
  )
  timeout: int = options.option(
    300, "Seconds after which a process that does not come, or does not answer, is given up."
  )

  def __post_init__(self):
    given = [n for n in ("coordinator_address", "num_processes", "process_id")
             if getattr(self, n) is not None]  # fmt: skip
    if self.auto and given:
      raise ValueError(f"`auto` finds `{given[0]}` out by itself: give one or the other")
    if given and len(given) < 3:
      raise ValueError(
        f"`{given[0]}` is given: `coordinator_address`, `num_processes` and `process_id` go "
        f"together"
      )
    if self.timeout < 1:
      raise ValueError(f"`timeout` must be at least 1, got {self.timeout}")
    if given:
      host, _, port = self.coordinator_address.rpartition(":")
      # isdecimal alone takes digits of any script; the port after it has to exist too.
      if not host or not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65534):
        raise ValueError(
          f"`coordinator_address` must be HOST:PORT with a port within 1..65534, got "
          f"{self.coordinator_address!r}"
        )
      if not 0 <= self.process_id < self.num_processes:
        raise ValueError(
          f"`process_id` must be within 0..{self.num_processes - 1}, got {self.process_id}"
        )


@contextlib.contextmanager
def joined(
  config: DistributedConfig,
  settings: Mapping[str, Any],
  *,
  describe: Callable[[Exception], str],
  end: Callable[[Exception], Any],
) -> Iterator[None]:
  """Joins the run's processes while it is open; does nothing for a run of one.

  It closes when all processes have come to its end. If one fails or dies before, every one, that
  one included, ends soon with a sentence that names it and exit code 1: nothing that would wait
  for the others, as jax does at exit, is run any more. Only process 0 writes to standard output.

  Args:
    config: How the processes find each other.
    settings: The options of the run by name, which all processes must have alike.
    describe: Returns the sentence about an error that the other processes print.
    end: Ends this process for an error of its own.

  Raises:
    ValueError: a process does not come in time, or was started with other options.
  """
  if config.coordinator_address is None and not config.auto:
    yield
    return
  address, process, count = config.coordinator_address, config.process_id, config.num_processes
  timeouts = {
    "initialization_timeout": config.timeout,
    # Ours comes first, and says more.
    "heartbeat_timeout_seconds": 10 + 2 * config.timeout,
  }
  if config.auto:
    jax.distributed.initialize(**timeouts)
    # jax tells what it found out nowhere else.
    from jax._src.distributed import global_state

    address, process, count = (
      global_state.coordinator_address, jax.process_index(), jax.process_count()
    )  # fmt: skip
  elif process == 0:
    # jax would share a port that is in use, and wait there for ever.
    open_port(int(address.rpartition(":")[2])).close()
  same = {name: value for name, value in settings.items() if name not in _OWN}
  watch = connect(address, process, count, config.timeout, same)
  if not config.auto:
    jax.distributed.initialize(address, count, process, **timeouts)
  watch.watch()
  try:
    with contextlib.redirect_stdout(io.StringIO() if process else sys.stdout):
      yield
  except Exception as error:
    watch.fail(describe(error), functools.partial(end, error))
  watch.leave()
