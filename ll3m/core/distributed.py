"""Start-up and shutdown of a run's processes on several hosts.

jax.distributed connects the devices, but does not report which process is missing: if a process
never starts, or dies, the others abort with a C++ stack trace or wait forever in a collective. So
every process also keeps a connection to process 0, over which they monitor each other (see
`peer_watch`).
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

# Options that must differ between processes.
_OWN = ("jax_distributed.process_id",)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """Options of a run with several processes."""

  coordinator_address: str | None = options.option(
    None,
    "HOST:PORT on which process 0 listens, for a run of several processes. PORT + 1 is used, too.",
  )
  num_processes: int | None = options.option(None, "Number of processes in the run.")
  process_id: int | None = options.option(None, "Index of this process, from 0.")
  auto: bool = options.option(
    False,
    "Detect the address, the number of processes and the index from the environment of the TPU or "
    "cluster.",
  )
  timeout: int = options.option(
    300, "Seconds to wait for a process to start or to respond before the run fails."
  )

  def __post_init__(self):
    given = [n for n in ("coordinator_address", "num_processes", "process_id")
             if getattr(self, n) is not None]  # fmt: skip
    if self.auto and given:
      raise ValueError(f"`auto` detects `{given[0]}`; give only one of them")
    if given and len(given) < 3:
      raise ValueError(
        f"`{given[0]}` is given, but `coordinator_address`, `num_processes` and `process_id` must "
        f"be given together"
      )
    if self.timeout < 1:
      raise ValueError(f"`timeout` must be at least 1, got {self.timeout}")
    if given:
      host, _, port = self.coordinator_address.rpartition(":")
      # isdecimal alone accepts digits of any script. The next port must exist, too.
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
  """Connects the processes of a run while the context is open; a no-op for a single process.

  The context closes once all processes have reached its end. If a process fails or dies earlier,
  all processes soon exit with code 1 and a message that names it, and skip everything that would
  wait for other processes, such as jax's exit handlers. Only process 0 writes to standard output.

  Args:
    config: The addresses and numbers of the processes.
    settings: The options of the run by name, which must be the same in all processes.
    describe: A function that returns the message about an error for the other processes to print.
    end: A function that ends this process after an error of its own.

  Raises:
    ValueError: A process does not connect in time, or was started with other options.
  """
  if config.coordinator_address is None and not config.auto:
    yield
    return
  address, process, count = config.coordinator_address, config.process_id, config.num_processes
  timeouts = {
    "initialization_timeout": config.timeout,
    # Our own timeout expires first, with a better message.
    "heartbeat_timeout_seconds": 10 + 2 * config.timeout,
  }
  if config.auto:
    jax.distributed.initialize(**timeouts)
    # jax exposes the detected address nowhere else.
    from jax._src.distributed import global_state

    address, process, count = (
      global_state.coordinator_address, jax.process_index(), jax.process_count()
    )  # fmt: skip
  elif process == 0:
    # jax would share a port that is already in use, and wait forever.
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
