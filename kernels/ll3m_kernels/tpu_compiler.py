"""Compiles for TPUs that are not there: libtpu holds the whole compiler, Mosaic included.

Needs the package libtpu on x86-64 Linux; no chip is touched. What is illegal on the hardware
(block shapes, layouts, too much vector memory) fails here as it does there.
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
# libtpu asks a cloud's metadata server where it is, complains when there is none, and lets one
# process at a time load it, for the chips' sake.
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
  """Returns the devices of a topology, such as "v5e:8x8", to build meshes and shardings of.

  Args:
    topology: generation and chips along each dimension.
    num_slices: how many of them, joined by the network of the data center.

  Raises:
    RuntimeError: libtpu is missing, or knows no such topology.
  """
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
  if topology.startswith("v4:"):
    # As jax has them on the hardware: both cores of a chip are one device.
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
    generation: "v4", "v5e", "v5p", "v6e" or "tpu7x".
    function: traced for that generation, so that kernels are laid out for it.
    *arrays: shapes and dtypes of its arguments.
    row_major: arguments and results lie in memory as kernels take and leave them, the last axis
      along the lanes. The compiler's own choice is another one for axes that do not fill these.
    donated: which of the arrays the function may write over.

  Raises:
    ValueError: unknown generation.
    jax.errors.JaxRuntimeError: what the compiler refuses.
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
  """Returns the vector memory of each kernel, by its name in the compiled module, in bytes.

  That is what the compiler gave to blocks and scratch; an operand that it already keeps in vector
  memory takes none again.
  """
  found = (_USED.search(line) for line in compiled.as_text().splitlines())
  return {match["name"]: int(match["size"]) for match in found if match}
