"""Loops, products and memory traffic read from compiled modules, against their programs."""

import jax
import jax.numpy as jnp
import pytest

from ll3m.planning import costs, hlo
from tests.planning.modules import module_of


def compiled(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return hlo.read(jax.jit(function).lower(*arguments).compile())


def test_products_in_nested_loops_count_once_per_iteration():
  def step(x, weights):
    def outer(x, _):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], None

    return jax.lax.scan(outer, x, None, length=3)[0] @ weights[0]

  module = compiled(step, (64, 128), (5, 128, 128))
  assert costs.flops(module, 0.0) == (3 * 5 + 1) * 2 * 64 * 128 * 128


def test_a_loop_of_unknown_length_counts_once():
  def step(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ x, x)

  assert costs.flops(compiled(step, (32, 32)), 0.0) == 2 * 32**3


def test_a_fusion_reads_its_operands_and_writes_its_result():
  module = compiled(lambda x, y: jnp.tanh(x) * y + 1, (256, 512), (256, 512))
  assert costs.hbm_bytes(module) == 3 * 256 * 512 * 4


def test_only_the_slice_of_a_stack_is_read():
  """Each layer reads its own slice, so the stack is read once and not once per layer."""
  layers, size = 64, 4096

  def step(x, stack):
    return jax.lax.scan(lambda x, w: (x * w, None), x, stack)[0]

  found = costs.hbm_bytes(compiled(step, (size,), (layers, size)))
  row = size * 4
  # Each layer reads its slice and x, and writes x. x is also copied once, and there are counters.
  assert 0 <= found - 3 * layers * row < 3 * row


NESTED = """HloModule jit_step
%slices (w: f32[64,256], i: s32[]) -> f32[1,256] {
  %w = f32[64,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,256]{1,0} dynamic-slice(%w, %i, %i), dynamic_slice_sizes={1,256}
}

%doubles (x: f32[1,256]) -> f32[1,256] {
  %x = f32[1,256]{1,0} parameter(0)
  ROOT %y = f32[1,256]{1,0} add(%x, %x)
}

%outer (p: f32[64,256], q: s32[]) -> f32[1,256] {
  %p = f32[64,256]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %n = f32[1,256]{1,0} fusion(%p, %q), kind=kLoop, calls=%slices
  ROOT %m = f32[1,256]{1,0} fusion(%n), kind=kLoop, calls=%doubles
}

ENTRY %main (a: f32[64,256], b: s32[]) -> f32[1,256] {
  %a = f32[64,256]{1,0} parameter(0)
  %b = s32[]{:S(6)} parameter(1)
  ROOT %o = f32[1,256]{1,0} fusion(%a, %b), kind=kLoop, calls=%outer
}
"""


def test_only_the_slice_in_a_nested_fusion_is_read():
  assert costs.hbm_bytes(module_of(NESTED)) == 2 * 256 * 4


# Products as the TPU compiler writes them. The last one is a batch of eight, whose windows are
# padded so that all but the diagonal products are with padding.
CONVOLUTIONS = {
  "plain": (
    "f32[64,96]", "bf16[64,128]", "bf16[128,96]", "dim_labels=bf_io->bf", 64 * 96 * 128
  ),
  "transposed": (
    "f32[64,96]", "bf16[64,128]", "bf16[96,128]", "dim_labels=bf_oi->bf", 64 * 96 * 128
  ),
  "one window": (
    "bf16[4,64,96]", "bf16[4,64,128]", "bf16[128,96,1]",
    "window={size=1}, dim_labels=0bf_io0->0bf", 4 * 64 * 96 * 128,
  ),
  "a batch": (
    "bf16[4,64,8,96]", "bf16[4,64,128,1]", "bf16[8,96,128,1]",
    "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
    4 * 64 * 8 * 96 * 128,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_flops_of_products_written_as_convolutions(name):
  out, left, right, attributes, multiplications = CONVOLUTIONS[name]
  module = module_of(
    f"""HloModule jit_step
ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}, metadata={{}}
}}
"""
  )
  assert costs.flops(module, 0.0) == 2 * multiplications


def test_arrays_have_their_size_and_memory_space():
  module = module_of(
    """HloModule m
ENTRY %main () -> (bf16[3,5], pred[7], u32[]) {
  ROOT %x = (bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, pred[7]{0}, u32[]{:S(2)}) custom-call(),
    custom_call_target="x"
}
"""
  )
  ((_, instruction),) = module.instructions()
  assert [(a.shape, a.bytes, a.in_hbm) for a in instruction.arrays] == [
    ((3, 5), 30, False), ((7,), 7, True), ((), 4, False)
  ]  # fmt: skip
  assert (instruction.bytes, instruction.hbm_bytes) == (41, 7)


@pytest.mark.parametrize(
  "data, message", [(b"", "no entry computation"), (b"\xff", "not a serialized HLO module")]
)
def test_bytes_that_are_no_module_are_refused(data, message):
  with pytest.raises(ValueError, match=message):
    hlo.parse(data)


def test_an_asynchronous_slice_is_named_after_its_operation():
  module = module_of(
    """HloModule m
%wrapped (p: f32[64,256]) -> f32[1,256] {
  %p = f32[64,256]{1,0} parameter(0)
  ROOT %s = f32[1,256]{1,0} slice(%p), slice={[0:1], [0:256]}
}
ENTRY %main (a: f32[64,256]) -> f32[1,256] {
  %a = f32[64,256]{1,0} parameter(0)
  %b = ((f32[64,256]{1,0}), f32[1,256]{1,0:S(1)}, u32[]{:S(2)}) async-start(%a), calls=%wrapped
  ROOT %d = f32[1,256]{1,0:S(1)} async-done(%b)
}
"""
  )
  assert [i.opcode for _, i in module.instructions()] == ["parameter", "slice-start", "async-done"]
  assert costs.hbm_bytes(module) == 256 * 4  # read, and written to vector memory
