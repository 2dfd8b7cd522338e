"""Which options make a run of several processes; tests/test_processes.py runs some."""

import pytest

from ll3m.core.distributed import DistributedConfig, joined


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_processes": 2}, "`num_processes` is given: `coordinator_address`, `num_processes` and"),
    ({"auto": True, "process_id": 0}, "`auto` finds `process_id` out by itself"),
    ({"timeout": 0}, "`timeout` must be at least 1, got 0"),
    (
      {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
      "`coordinator_address` must be HOST:PORT with a port within 1..65534, got 'host'",
    ),
    *(
      (
        {"coordinator_address": f"host:{port}", "num_processes": 2, "process_id": 0},
        f"a port within 1..65534, got 'host:{port}'",
      )
      for port in ("0", "65535", "-1", "²")
    ),
    (
      {"coordinator_address": "host:1", "num_processes": 2, "process_id": 2},
      "`process_id` must be within 0..1, got 2",
    ),
  ],
)
def test_options_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    DistributedConfig(**options)


def test_a_run_of_one_process_joins_nobody():
  with joined(DistributedConfig(), {}, describe=str, end=lambda error: None):
    pass
