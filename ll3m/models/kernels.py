"""The interface between models and kernels: the implementation, and the mesh."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ll3m.core.sharding import BATCH_AXES, HEAD_AXIS
from ll3m_kernels import Sharding


@dataclasses.dataclass(frozen=True)
class Kernels:
  """Options with which a model calls the kernels.

  Attributes:
    implementation: "pallas", "xla", or None for the default of the platform; see
      `ll3m_kernels.dispatch`.
    sharding: The sharding of activations on a mesh of several devices, over rows and heads.
  """

  implementation: str | None = None
  sharding: Sharding | None = None

  @classmethod
  def on(cls, mesh: Mesh, *, implementation: str | None = None) -> "Kernels":
    """Returns the options for an LL3M model on a mesh; see `ll3m.core.sharding`."""
    return cls(implementation, Sharding(mesh, BATCH_AXES, HEAD_AXIS))

  @property
  def options(self) -> dict[str, Any]:
    """The keyword arguments of every kernel."""
    return {"implementation": self.implementation, "sharding": self.sharding}

  def constrain(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Constrains the residual stream to be sharded over rows only."""
    if self.sharding is None:
      return x
    placement = NamedSharding(self.sharding.mesh, self.sharding.rows(x.ndim))
    return jax.lax.with_sharding_constraint(x, placement)

  def whole_rows(self, table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Constrains a lookup table to be sharded over rows, along the mesh axis of the heads.

    Without the constraint, the compiler moves the table between the devices of all axes, including
    dp, which may be connected by a slow network.
    """
    if self.sharding is None:
      return table
    divides = len(table) % self.sharding.head_shards == 0
    spec = PartitionSpec(self.sharding.head_axis if divides else None, None)
    placement = NamedSharding(self.sharding.mesh, spec)
    return jax.lax.with_sharding_constraint(table, placement)


# The platform's default implementation on one device.
DEFAULT_KERNELS = Kernels()
