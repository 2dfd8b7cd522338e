"""Which options make a run of several processes; tests/test_processes.py runs some."""

import threading

import pytest

from ll3m.core import processes
from ll3m.core.processes import ProcessesConfig, joined


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_processes": 2}, "num_processes is given: coordinator_address, num_processes and"),
    ({"auto": True, "process_id": 0}, "auto finds process_id out by itself"),
    ({"timeout": 0}, "timeout must be at least 1, got 0"),
    (
      {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
      "coordinator_address must be HOST:PORT, got 'host'",
    ),
    (
      {"coordinator_address": "host:1", "num_processes": 2, "process_id": 2},
      "process_id must be within 0..1, got 2",
    ),
  ],
)
def test_options_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    ProcessesConfig(**options)


def test_a_run_of_one_process_joins_nobody():
  with joined(ProcessesConfig(), {"seed": 1}):
    pass


def test_two_with_one_number_are_told(free_port):
  """Of three, two say that they are process 1: all three hear of it."""
  port = free_port()
  heard = []

  def meet(process):
    try:
      processes._meet(f"localhost:{port}", process, 3, 20, {"seed": 1})
    except ValueError as error:
      heard.append(str(error))

  threads = [threading.Thread(target=meet, args=(process,)) for process in (0, 1, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  assert heard == ["two processes were started with --jax_distributed.process_id=1"] * 3


def test_who_is_not_there_is_told(free_port):
  port = free_port()
  with pytest.raises(
    ValueError, match=f"process 0 did not answer at localhost:{port + 1} within 1"
  ):
    processes._meet(f"localhost:{port}", 1, 2, 1, {})
