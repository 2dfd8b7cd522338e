"""The options of runs with several processes; tests/test_processes.py starts such runs."""

import pytest

from ll3m.core.distributed import DistributedConfig, joined


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_processes": 2}, "`num_processes` is given, .*`coordinator_address`"),
    ({"auto": True, "process_id": 0}, "`auto` .*`process_id`"),
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
def test_invalid_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    DistributedConfig(**options)


def test_single_process_connects_to_no_other():
  with joined(DistributedConfig(), {}, describe=str, end=lambda error: None):
    pass
