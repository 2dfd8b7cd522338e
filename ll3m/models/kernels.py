"""The one seam between the models and the kernels: which implementation runs, on which mesh."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ll3m.core.sharding import BATCH_AXES, HEAD_AXIS
from ll3m_kernels import Sharding


@dataclasses.dataclass(frozen=True)
class Kernels:
  """How a model calls the kernels.

  Attributes:
    implementation: None for what suits the platform, or "pallas" or "xla"; see
      `ll3m_kernels.dispatch`.
    sharding: how activations lie on a mesh of several devices: rows and heads may be split.
  """

  implementation: str | None = None
  sharding: Sharding | None = None

  @classmethod
  def on(cls, mesh: Mesh, *, implementation: str | None = None) -> "Kernels":
    """Returns how a model of ours calls them on a mesh: see `ll3m.core.sharding`."""
    return cls(implementation, Sharding(mesh, BATCH_AXES, HEAD_AXIS))

  @property
  def options(self) -> dict[str, Any]:
    """The keyword arguments of every kernel."""
    return {"implementation": self.implementation, "sharding": self.sharding}

  def constrain(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Keeps the residual stream split by rows, and by nothing else."""
    if self.sharding is None:
      return x
    placement = NamedSharding(self.sharding.mesh, self.sharding.rows(x.ndim))
    return jax.lax.with_sharding_constraint(x, placement)

  def whole_rows(self, table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Gathers the rows of a table that is to be looked up in, split by rows over the heads' axis.

    Left to itself the compiler moves the table between the devices of all axes, dp's included,
    which may be joined by a slow network.
    """
    if self.sharding is None:
      return table
    divides = len(table) % self.sharding.head_shards == 0
    spec = PartitionSpec(self.sharding.head_axis if divides else None, None)
    placement = NamedSharding(self.sharding.mesh, spec)
    return jax.lax.with_sharding_constraint(table, placement)


# What suits the platform, on one device.
DEFAULT_KERNELS = Kernels()
