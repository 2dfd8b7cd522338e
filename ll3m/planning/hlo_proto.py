"""The fields of XLA's `HloModuleProto` that plans read, declared for protobuf.

The generated classes come only with TensorFlow, whose import takes seconds. Protobuf skips
undeclared fields, and field numbers never change. Names and numbers are those of
xla/service/hlo.proto and xla/xla_data.proto.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

_PACKAGE = "ll3m_hlo"  # a second definition of XLA's own package would conflict in the pool
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
  "int32": _Field.TYPE_INT32,
  "int64": _Field.TYPE_INT64,
  "string": _Field.TYPE_STRING,
  "uint32": _Field.TYPE_UINT32,
  "uint64": _Field.TYPE_UINT64,
}
# Fields as "name type number"; a star after the type marks a repeated field.
_MESSAGES = {
  "Module": "computations Computation* 3, entry_computation_id int64 6",
  "Computation": "name string 1, instructions Instruction* 2, id int64 5, root_id int64 6",
  "Instruction": (
    "name string 1, opcode string 2, shape Shape 3, literal Literal 8, parameter_number int64 9, "
    "window Window 15, convolution_dimension_numbers Convolution 16, custom_call_target string 28, "
    "dot_dimension_numbers Dot 30, id int64 35, operand_ids int64* 36, "
    "called_computation_ids int64* 38, replica_groups Group* 49, source_target_pairs Pair* 52, "
    "frontend_attributes Attributes 68, collective_device_list DeviceList 87, "
    "iota_collective_device_list IotaGroups 92, mesh_axes_replica_group_list MeshGroups 93"
  ),
  "Shape": "element_type int32 2, dimensions int64* 3, tuple_shapes Shape* 4, layout Layout 5",
  "Layout": "memory_space int64 8",
  "Literal": "s32s int32* 4, s64s int64* 5, u32s uint32* 6, u64s uint64* 7",
  "Window": "dimensions WindowDimension* 1",
  "WindowDimension": (
    "size int64 1, stride int64 2, padding_low int64 3, window_dilation int64 5, "
    "base_dilation int64 6"
  ),
  "Convolution": (
    "kernel_input_feature_dimension int64 3, kernel_spatial_dimensions int64* 6, "
    "output_batch_dimension int64 9, output_feature_dimension int64 10, "
    "input_spatial_dimensions int64* 11, output_spatial_dimensions int64* 12"
  ),
  "Dot": "lhs_contracting_dimensions int64* 1",
  "Group": "replica_ids int64* 1",
  "Pair": "source int64 1, target int64 2",
  "Attributes": "map Attribute* 1",
  "Attribute": "key string 1, value string 2",
  "DeviceList": "replica_groups Group* 1, iota_replica_group_list IotaGroups 2",
  "IotaGroups": (
    "num_replica_groups int64 1, num_devices_per_group int64 2, iota_reshape_dims int64* 3, "
    "iota_transpose_perm int32* 4"
  ),
  "MeshGroups": "mesh Mesh 1, axes AxisRef* 2",
  "Mesh": "axes MeshAxis* 1, device_ids int64* 2",
  "MeshAxis": "name string 1, size int64 2",
  "AxisRef": "mesh_axis_index int64 1, sub_axis_info SubAxis 2",
  "SubAxis": "pre_size int64 1, size int64 2",
}  # fmt: skip


def parse(serialized: bytes) -> Any:
  """Parses a serialized `HloModuleProto`.

  Raises:
    ValueError: The bytes are not a protobuf message.
  """
  try:
    return _module_class().FromString(serialized)
  except message.DecodeError as error:
    raise ValueError(f"not a serialized HLO module: {error}") from error


@functools.cache
def _module_class() -> Any:
  file = descriptor_pb2.FileDescriptorProto(name="hlo.proto", package=_PACKAGE, syntax="proto3")
  for name, fields in _MESSAGES.items():
    described = file.message_type.add(name=name)
    for field in fields.split(", "):
      field_name, kind, number = field.split()
      repeated, kind = kind.endswith("*"), kind.removesuffix("*")
      described.field.add(
        name=field_name,
        number=int(number),
        label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL,
        type=_SCALARS.get(kind, _Field.TYPE_MESSAGE),
        type_name=None if kind in _SCALARS else f".{_PACKAGE}.{kind}",
      )
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Module"))
