"""Compilation for TPUs that are not attached; libtpu contains the whole compiler, Mosaic included.

This needs the package libtpu on x86-64 Linux and touches no chip. Programs that are illegal on the
hardware (block shapes, layouts, too much vector memory) fail to compile here too.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout

from ll3m_kernels import dispatch

# The smallest slice of each generation.
_TOPOLOGIES = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "tpu7x": "tpu7x:2x2x1",
}
# By default, libtpu queries a cloud metadata server for its location, warns if there is none, and
# protects the chips by letting only one process load it at a time.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_USED = re.compile(
  r"%(?P<name>[\w.]+) = .*custom_call_target=\"tpu_custom_call\".*"
  r"\"used_scoped_memory_configs\":\[\{[^\]]*\"size\":\"(?P<size>\d+)\""
)


def devices(topology: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """Returns the devices of a topology such as "v5e:8x8", for meshes and shardings.

  Args:
    topology: Generation, and number of chips along each dimension.
    num_slices: Number of such slices, joined by the data-center network.

  Raises:
    RuntimeError: The package libtpu is missing, or does not know the topology.
  """
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
  if topology.startswith("v4:"):
    # As on the hardware, where both cores of a chip are one jax device.
    options["chip_config_name"] = "megacore"
  return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def compile_for(
  generation: str,
  function: Callable[..., Any],
  *arrays: jax.ShapeDtypeStruct,
  row_major: bool = False,
  donated: tuple[int, ...] = (),
) -> jax.stages.Compiled:
  """Compiles a function for one device of a generation.

  Args:
    generation: TPU generation: "v4", "v5e", "v5p", "v6e" or "tpu7x".
    function: Function to compile; its kernels are laid out for that generation.
    *arrays: Shapes and dtypes of its arguments.
    row_major: Whether arguments and results have the memory layout of kernels, with the last axis
      along the lanes. For axes that do not fill the lanes, the compiler would choose another one.
    donated: Indices of the arrays that the function may overwrite.

  Raises:
    ValueError: The generation is unknown.
    jax.errors.JaxRuntimeError: The compiler rejects the program.
  """
  with dispatch.target(generation):
    place = jax.sharding.SingleDeviceSharding(devices(_TOPOLOGIES[generation])[0])

    def placed(x):
      layout = Format(Layout(tuple(range(len(x.shape)))), place) if row_major else place
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    arrays = [placed(x) for x in arrays]
    results = None
    if row_major:
      results = jax.tree.map(lambda x: placed(x).format, jax.eval_shape(function, *arrays))
    return jax.jit(function, out_shardings=results, donate_argnums=donated).lower(*arrays).compile()


def vmem_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns the VMEM of each kernel in bytes, by its name in the compiled module.

  This is the VMEM that the compiler allocated for blocks and scratch. An operand that already
  resides in VMEM is not counted again.
  """
  found = (_USED.search(line) for line in compiled.as_text().splitlines())
  return {match["name"]: int(match["size"]) for match in found if match}
