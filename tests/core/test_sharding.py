"""The mesh flag, and the table from parameters to mesh axes."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec

from ll3m import families
from ll3m.core import sharding
from ll3m.families.tensor_rules import parameter_shapes


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


def test_minus_one_takes_the_remaining_devices():
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


def test_specs_follow_the_table_where_sizes_are_divisible():
  mesh = sharding.make_mesh("2,2,2")
  spec = sharding.parameter_spec
  assert spec("embed/embedding", (10, 8), mesh) == PartitionSpec("mp", "fsdp")
  assert spec("layers/attention/out/w", (3, 8, 8), mesh) == PartitionSpec(None, "mp", "fsdp")
  assert spec("final_norm/scale", (8,), mesh) == PartitionSpec(None)
  assert spec("embed/embedding", (11, 8), mesh) == PartitionSpec(None, "fsdp")  # 11 is odd
  with pytest.raises(ValueError, match="0 sharding rules match parameter 'layers/new/w'"):
    spec("layers/new/w", (8, 8), mesh)


def test_unsplit_dimensions_are_described():
  mesh = sharding.make_mesh("2,2,2")
  params = {
    "embed": {"embedding": jax.ShapeDtypeStruct((11, 8), "float32")},
    "layers/attention/query": {"w": jax.ShapeDtypeStruct((3, 8, 6), "float32")},
    "layers/mlp/down": {"w": jax.ShapeDtypeStruct((3, 5, 7), "float32")},
    "final_norm": {"scale": jax.ShapeDtypeStruct((7,), "float32")},
  }
  assert sharding.unsplit(params, mesh) == [
    "embed/embedding: 11 is not divisible by mp=2",
    "layers/mlp/down/w: 5 is not divisible by mp=2",
    "layers/mlp/down/w: 7 is not divisible by fsdp=2",
  ]


class Slice:
  """A device, as jax's mesh utilities see it, of one of two slices of 2 x 2 chips."""

  platform, device_kind, core_on_chip, num_cores = "tpu", "TPU v5 lite", 0, 1

  def __init__(self, index):
    self.id, self.slice_index, self.process_index = index, index // 4, index // 4
    self.coords = (index % 2, index // 2 % 2, 0)


def test_only_dp_spans_slices():
  devices = [Slice(index) for index in range(8)]
  mesh = sharding.make_mesh("-1,2,1", devices)
  assert dict(mesh.shape) == {"dp": 4, "fsdp": 2, "mp": 1}
  for row in mesh.devices.reshape(4, 2):
    assert len({device.slice_index for device in row}) == 1
  assert {device.slice_index for device in mesh.devices[:, 0, 0]} == {0, 1}
  with pytest.raises(ValueError, match="dp must be a multiple of the 2 slices, got dp=1"):
    sharding.make_mesh("1,4,2", devices)


def test_rows_are_split_over_dp_and_fsdp():
  mesh = sharding.make_mesh("2,2,2")
  assert sharding.local_rows(mesh, 8) == list(range(8))  # one process has them all
  with pytest.raises(ValueError, match="multiple of dp x fsdp = 4, got 6"):
    sharding.local_rows(mesh, 6)
  placement = sharding.batch_sharding(mesh, leading=1)
  assert placement.shard_shape((3, 8, 5)) == (3, 2, 5)
  assert jax.device_put(jax.numpy.zeros((3, 8, 5)), placement).sharding == placement
