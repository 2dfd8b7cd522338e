"""The mesh flag, and the table from parameters to mesh axes."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec

from ll3m import families
from ll3m.core import sharding
from ll3m.hf.mapping import parameter_shapes


@pytest.mark.parametrize(
  ("text", "sizes"),
  [
    ("-1,2,4", (-1, 2, 4)),
    ("1, 1, 1", (1, 1, 1)),
    ("dp:1,fsdp:-1,mp:4", (1, -1, 4)),
    ("mp:2,dp:-1", (-1, 1, 2)),
  ],
)
def test_mesh_dim_forms(text, sizes):
  assert sharding.parse_mesh_dim(text) == sizes


@pytest.mark.parametrize(
  "text", ["", "1,2", "1,2,3,4", "-1,-1,2", "0,1,1", "-2,1,1", "a,b,c", "dp:1,dp:2", "pp:4", "dp:x"]
)
def test_mesh_dim_mistakes(text):
  with pytest.raises(ValueError, match="mesh_dim") as error:
    sharding.parse_mesh_dim(text)
  assert repr(text) in str(error.value)


def test_mesh_takes_the_rest_of_the_devices():
  assert dict(sharding.make_mesh("-1,2,2").shape) == {"dp": 2, "fsdp": 2, "mp": 2}
  with pytest.raises(ValueError, match="needs a multiple of 3 devices, there are 8"):
    sharding.make_mesh("-1,3,1")
  with pytest.raises(ValueError, match="needs 4 devices, there are 8"):
    sharding.make_mesh("1,2,2")


@pytest.mark.parametrize("preset", families.PRESETS)
def test_every_parameter_matches_exactly_one_rule(preset):
  family, config = families.PRESETS[preset]
  for path in parameter_shapes(family.rules, config):
    matches = [rule for rule, _ in sharding.PARAMETER_RULES if re.fullmatch(rule, path)]
    assert len(matches) == 1, path


def test_every_rule_is_used():
  paths = {p for f, c in families.PRESETS.values() for p in parameter_shapes(f.rules, c)}
  for rule, _ in sharding.PARAMETER_RULES:
    assert any(re.fullmatch(rule, path) for path in paths), rule


def test_specs_follow_the_table_and_fall_back():
  mesh = sharding.make_mesh("2,2,2")
  spec = sharding.parameter_spec
  assert spec("embed/embedding", (10, 8), mesh) == PartitionSpec("mp", "fsdp")
  assert spec("layers/attention/out/w", (3, 8, 8), mesh) == PartitionSpec(None, "mp", "fsdp")
  assert spec("final_norm/scale", (8,), mesh) == PartitionSpec(None)
  assert spec("embed/embedding", (11, 8), mesh) == PartitionSpec(None, "fsdp")  # 11 is odd
  with pytest.raises(ValueError, match="0 sharding rules match parameter 'layers/new/w'"):
    spec("layers/new/w", (8, 8), mesh)


def test_rows_are_split_over_dp_and_fsdp():
  mesh = sharding.make_mesh("2,2,2")
  assert sharding.local_rows(mesh, 8) == list(range(8))  # one process has them all
  with pytest.raises(ValueError, match="multiple of dp x fsdp = 4, got 6"):
    sharding.local_rows(mesh, 6)
  placement = sharding.batch_sharding(mesh, leading=1)
  assert placement.shard_shape((3, 8, 5)) == (3, 2, 5)
  assert jax.device_put(jax.numpy.zeros((3, 8, 5)), placement).sharding == placement
