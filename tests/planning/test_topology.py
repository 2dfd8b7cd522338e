"""Machines as libtpu describes them, in a separate process, which libtpu requires."""

import json
import subprocess
import sys

import pytest

MACHINES = """
import json, sys
from ll3m.core import sharding
from ll3m.planning import topology

found = {}
for name, slices in json.loads(sys.argv[1]):
  devices = topology.devices(name, slices)
  mesh = sharding.make_mesh("-1,4,1", devices)
  found[f"{name} x {slices}"] = [len(devices), devices[0].num_cores, mesh.devices.shape[0]]
print(json.dumps(found))
"""
# Number of devices and cores per device, as jax reports them on the hardware.
EXPECTED = {
  ("v3:4x8", 1): (64, 1),
  ("v4:2x2x4", 1): (16, 2),
  ("v5e:4x4", 1): (16, 1),
  ("v5p:2x2x4", 1): (16, 2),
  ("v6e:4x4", 1): (16, 1),
  ("tpu7x:2x2x4", 1): (32, 1),
  ("v4:2x2x4", 2): (32, 2),
  ("v5e:4x4", 2): (32, 1),
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[int]]:
  done = subprocess.run(
    [sys.executable, "-c", MACHINES, json.dumps(list(EXPECTED))], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("machine", "expected"), EXPECTED.items(), ids=str)
def test_a_mesh_can_be_made_of_every_generation(found, machine, expected):
  name, slices = machine
  count, cores = expected
  assert found[f"{name} x {slices}"] == [count, cores, count // 4]
