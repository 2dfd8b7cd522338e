"""FLOPs and memory traffic of a compiled module on one device, counting every loop iteration."""

import math

import numpy as np

from ll3m.planning.hlo import Computation, Instruction, Module

# Number of T x S x H products in a kernel, by the beginning of its name.
_ATTENTION_PRODUCTS = {"flash_attention_forward": 2, "flash_attention_backward": 5}

# Instructions that do not access memory themselves, or whose start has been counted.
_FREE = frozenset(
  (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "copy-done", "slice-done", "async-start",
    "async-update", "async-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
    "opt-barrier",
  )
)  # fmt: skip
_KERNEL = "tpu_custom_call"
_ALLOCATES = ("AllocateBuffer", "ConcatBitcast")
_READS_A_PART = ("dynamic-slice", "slice", "gather", "slice-start")


def kernels(module: Module) -> tuple[str, ...]:
  """Returns the names of the Pallas kernels that run, without the suffixes that XLA adds."""
  called = (i for _, i in module.instructions() if i.proto.custom_call_target == _KERNEL)
  return tuple(sorted({i.name.split(".")[0] for i in called}))


def flops(module: Module, keys_per_query: float) -> float:
  """Returns the floating-point operations of all matrix products on one device.

  Args:
    module: Compiled module.
    keys_per_query: Average number of keys that an attention kernel processes per query. It depends
      on the mask, which is not in the module.
  """
  total = 0.0
  for name, instruction in module.instructions():
    total += module.times[name] * _flops_of(instruction, module.computations[name], keys_per_query)
  return total


def _flops_of(instruction: Instruction, computation: Computation, keys_per_query: float) -> float:
  if instruction.opcode == "dot":
    left = computation[instruction.operands[0]].arrays[0].shape
    contracted = instruction.proto.dot_dimension_numbers.lhs_contracting_dimensions
    sizes = [left[i] for i in contracted]
    return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(sizes)
  if instruction.opcode == "convolution":
    return 2.0 * _multiplications(instruction, computation)
  if instruction.proto.custom_call_target == _KERNEL:
    for name, products in _ATTENTION_PRODUCTS.items():
      if instruction.name.startswith(name):
        return 2.0 * products * math.prod(instruction.arrays[0].shape) * keys_per_query
  return 0.0


def _multiplications(instruction: Instruction, computation: Computation) -> int:
  """Counts the multiplications of a convolution, except those by its padding.

  The TPU compiler writes every matrix product as a convolution. Batch dimensions become spatial
  dimensions, padded so that all but the diagonal products are with padding.
  """
  left, right = (computation[name].arrays[0].shape for name in instruction.operands[:2])
  out, numbers = instruction.arrays[0].shape, instruction.proto.convolution_dimension_numbers
  count = (
    out[numbers.output_batch_dimension]
    * out[numbers.output_feature_dimension]
    * right[numbers.kernel_input_feature_dimension]
  )
  for window, of_left, of_right, of_out in zip(
    instruction.proto.window.dimensions,
    numbers.input_spatial_dimensions,
    numbers.kernel_spatial_dimensions,
    numbers.output_spatial_dimensions,
    strict=True,
  ):
    reached = (
      np.arange(out[of_out])[:, None] * window.stride
      + np.arange(right[of_right])[None] * window.window_dilation
      - window.padding_low
    )
    gaps = window.base_dilation
    inside = (reached >= 0) & (reached <= (left[of_left] - 1) * gaps) & (reached % gaps == 0)
    count *= int(inside.sum())
  return count


def hbm_bytes(module: Module) -> float:
  """Returns the bytes that one device reads from and writes to its main memory.

  Values within a fusion do not go to memory. For an array that is only sliced, the slices count.
  """
  total = 0.0
  for name, instruction in module.instructions():
    if module.home[name] == name:
      total += module.times[name] * _bytes_of(instruction, name, module)
  return total


def _bytes_of(instruction: Instruction, computation: str, module: Module) -> int:
  opcode, around = instruction.opcode, module.computations[computation]
  if opcode in _FREE or instruction.proto.custom_call_target in _ALLOCATES:
    return 0
  operands = [around[name] for name in instruction.operands]
  if opcode == "fusion":
    return _fusion_bytes(instruction, operands, module)
  if opcode in ("copy-start", "slice-start"):  # the result is (to, from, ..) or ((from), to, ..)
    to = instruction.arrays[0 if opcode == "copy-start" else 1]
    return to.bytes * (to.in_hbm + (operands[0].hbm_bytes > 0))
  if opcode == "dynamic-update-slice":
    return 2 * operands[1].bytes * (operands[0].hbm_bytes > 0)
  if opcode in _READS_A_PART:
    return instruction.bytes * (operands[0].hbm_bytes > 0) + instruction.hbm_bytes
  return sum(operand.hbm_bytes for operand in operands) + instruction.hbm_bytes


def _fusion_bytes(instruction: Instruction, operands: list[Instruction], module: Module) -> int:
  inside = _inside(instruction, module)
  total = instruction.hbm_bytes
  for inner in inside.values():
    if inner.opcode == "parameter":
      operand = operands[inner.proto.parameter_number]
      total += min(_read_of(inner, inside, module), operand.hbm_bytes)
    elif inner.opcode == "dynamic-update-slice" and instruction.hbm_bytes:
      # It writes its update in place, not the whole array that is its result.
      total += inside[inner.operands[1]].bytes - inner.bytes
  return max(0, total)


def _inside(fusion: Instruction, module: Module) -> Computation:
  (name,) = fusion.runs
  return module.computations[name]


def _read_of(value: Instruction, inside: Computation, module: Module) -> int:
  """Returns the bytes of a fusion's operand that its instructions read, nested fusions included."""
  read = 0
  for user in inside.values():
    for position, name in enumerate(user.operands):
      if name != value.name:
        continue
      if user.opcode == "bitcast":
        read += _read_of(user, inside, module)
      elif user.opcode in _READS_A_PART:
        read += user.bytes if position == 0 else value.bytes
      elif user.opcode == "fusion":
        read += _read_by_nested(user, position, module)
      elif user.opcode != "dynamic-update-slice" or position != 0:
        read += value.bytes
  return read


def _read_by_nested(fusion: Instruction, position: int, module: Module) -> int:
  """Returns the bytes of one operand that a nested fusion reads."""
  inside = _inside(fusion, module)
  read = sum(
    _read_of(inner, inside, module)
    for inner in inside.values()
    if inner.opcode == "parameter" and inner.proto.parameter_number == position
  )
  # In an elementwise fusion, each element of the result reads one of the operand: if a computed
  # value is sliced, only the slice is computed.
  is_elementwise = not any(i.opcode in ("reduce", "convolution", "dot") for i in inside.values())
  return min(read, fusion.bytes) if is_elementwise else read
