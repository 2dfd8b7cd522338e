"""Collectives of programs that request them explicitly, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ll3m.core import sharding
from ll3m.planning import hlo
from ll3m.planning.collectives import Collective, collectives, device_groups
from tests.planning.modules import module_of

AXES = {"dp": 2, "fsdp": 2, "mp": 2}
SIZE = 64  # floats per device
BYTES = 4 * SIZE
LOOPS = 5


def sent(body, *, loops=LOOPS):
  mesh = sharding.make_mesh("2,2,2")

  def step(x):
    return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=loops)[0]

  spec = P(("dp", "fsdp", "mp"))
  mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  x = jax.ShapeDtypeStruct((8 * SIZE,), jnp.float32, sharding=NamedSharding(mesh, spec))
  return collectives(hlo.read(jax.jit(mapped).lower(x).compile()), AXES)


def part(x, axis):
  """Returns the device's own part of an array gathered over an axis."""
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * SIZE, SIZE)


# Body, axis, and the bytes that a device sends in a ring for each byte of the operand.
PROGRAMS = {
  "all-reduce": (lambda x: jax.lax.psum(x, "mp") * 0.5, "mp", 2 * 1 / 2),
  "all-reduce over two": (lambda x: jax.lax.psum(x, ("dp", "fsdp")) * 0.5, "dp+fsdp", 2 * 3 / 4),
  "all-gather": (lambda x: part(jax.lax.all_gather(x, "fsdp", tiled=True), "fsdp"), "fsdp", 1),
  "reduce-scatter": (
    lambda x: jnp.tile(jax.lax.psum_scatter(x, "dp", tiled=True), 2), "dp", 1 / 2
  ),
  "collective-permute": (lambda x: jax.lax.ppermute(x, "mp", [(0, 1), (1, 0)]), "mp", 1),
  "all-to-all": (
    lambda x: jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=0, tiled=True), "fsdp", 1 / 2
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_collectives_have_the_kind_axis_and_bytes_of_the_program(name):
  body, axis, share = PROGRAMS[name]
  kind = name.split(" ")[0]
  assert sent(body) == [Collective(kind, LOOPS * BYTES * share, axis, False)]


def test_each_axis_has_its_own_entry_and_the_largest_is_first():
  found = sent(lambda x: jax.lax.psum(jax.lax.psum(x[:8], "dp").sum() + x, "mp") * 0.1)
  assert [(row.axis, row.kind) for row in found] == [("mp", "all-reduce"), ("dp", "all-reduce")]


ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}
"""

# The same groups, pairs of neighbours along fsdp of a 2 x 2 x 2 mesh, in each of XLA's forms.
FORMS = (
  "collective-permute(%a), source_target_pairs={{0,2},{1,3},{4,6},{5,7}}",
  *(
    f"all-reduce(%a), replica_groups={groups}, channel_id=1, use_global_device_ids=true, "
    "to_apply=%add"
    for groups in (
      "{{0,2},{1,3},{4,6},{5,7}}",
      "[4,2]<=[2,2,2]T(0,2,1)",
      "mesh['dp'=2,'fsdp'=2,'mp'=2] {'fsdp'}",
      "mesh['mp'=2,'fsdp'=2,'dp'=2], device_ids=([2,2,2]T(2,1,0)) {'fsdp'}",
    )
  ),
)


def groups_of(form):
  module = module_of(
    f"""HloModule m, replica_count=1, num_partitions=8
{ADD}
ENTRY %main (a: f32[64]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} {form}
}}
"""
  )
  return device_groups(module.computations["main"]["r"].proto)


@pytest.mark.parametrize("form", FORMS)
def test_groups_are_read_in_all_forms(form):
  assert sorted(map(tuple, groups_of(form).tolist())) == [(0, 2), (1, 3), (4, 6), (5, 7)]


@pytest.mark.parametrize("groups", ["mesh['dp'=8] {'dp':(2)4}", "{}"])
def test_unknown_groups_are_none(groups):
  assert groups_of(f"all-reduce(%a), replica_groups={groups}, to_apply=%add") is None


MODULE = """HloModule jit_step, replica_count=1, num_partitions=8
ADD
%start (p: bf16[64]) -> bf16[128] {
  %p = bf16[64]{0} parameter(0)
  ROOT %g = bf16[128]{0} all-gather(%p), dimensions={0}, channel_id=5, GROUPS, CHAIN
}

%wait (p: bf16[64]) -> bf16[128] {
  %p.1 = bf16[64]{0} parameter(0)
  ROOT %g.1 = bf16[128]{0} all-gather(%p.1), dimensions={0}, channel_id=5, GROUPS, CHAIN
}

%all-reduce-scatter.3.clone (q: f32[64]) -> f32[32] {
  %q = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%q), channel_id=6, replica_groups=[4,2]<=[8], to_apply=%add
  %i = s32[] constant(0)
  ROOT %s = f32[32]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={32}
}

ENTRY %main (a: bf16[64], b: f32[64]) -> f32[32] {
  %a = bf16[64]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %f = bf16[128]{0} fusion(%a), kind=kCustom, calls=%start
  %w = bf16[128]{0} fusion(%a), kind=kCustom, calls=%wait
  %t = token[] after-all()
  %n = (f32[64]{0}, u32[], token[]) send(%b, %t), channel_id=7, is_host_transfer=true, NETWORK
  ROOT %o = f32[32]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3.clone
}
"""
for name, text in {
  "ADD": ADD,
  "GROUPS": "replica_groups={{0,1},{2,3},{4,5},{6,7}}",
  "CHAIN": 'frontend_attributes={chain_id="0"}',
  "NETWORK": 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
}.items():
  MODULE = MODULE.replace(name, text)


def test_collectives_are_found_in_the_forms_of_the_tpu_compiler():
  """A gather that two fusions share, a fused reduce-scatter, and one over the hosts' network."""
  slices = np.array([0, 0, 0, 0, 1, 1, 1, 1])
  assert set(collectives(module_of(MODULE), AXES, slices)) == {
    Collective("all-gather", 128.0, "mp", False),
    Collective("reduce-scatter", 128.0, "mp", False),
    Collective("all-reduce", 256, "dp", True),
  }
