"""The state of a training run on its devices: shapes, shardings and initialisation."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ll3m.core import sharding
from ll3m.core.dtypes import DTYPES
from ll3m.models.transformer import Model, Params
from ll3m.training.optimizer import state_shardings
from ll3m.training.rounding import MasterState
from ll3m.training.step import TrainState, init_state

Shapes = dict[str, dict[str, jax.ShapeDtypeStruct]]


@dataclasses.dataclass(frozen=True)
class StatePlan:
  """Shapes, shardings and initialisers of a `TrainState`; uses no device memory.

  Attributes:
    params: Shapes of the parameters, with shardings.
    state: Shapes of the whole state, with shardings.
    start_dtype: Dtype of the parameters from which a state is initialised: float32 if the optimizer
      keeps a master copy, which starts at the source's full precision; else the param_dtype.
    init: Jitted rng -> random parameters on the devices, in `start_dtype`.
    start: Jitted (parameters in `start_dtype`, rng) -> state before the first step.
  """

  params: Shapes
  state: TrainState
  start_dtype: Any
  init: Callable[[jax.Array], Params]
  start: Callable[[Params, jax.Array], TrainState]

  @property
  def param_shardings(self) -> dict[str, dict[str, jax.sharding.Sharding]]:
    """Sharding of every parameter."""
    return jax.tree.map(lambda x: x.sharding, self.params)

  def count(self) -> int:
    """Returns the number of parameters."""
    return sum(x.size for x in jax.tree.leaves(self.params))


def plan_state(
  model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, *, param_dtype: str
) -> StatePlan:
  """Plans the train state of a model on a mesh."""
  dtype = DTYPES[param_dtype]

  def cast(params, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), params)

  def place(tree, shardings):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )

  shapes = jax.eval_shape(lambda rng: cast(model.init(rng), dtype), jax.random.key(0))
  shardings = sharding.parameter_shardings(shapes, mesh)
  everywhere = sharding.replicated(mesh)
  opt_shardings = state_shardings(optimizer, shapes, shardings, everywhere)
  all_shardings = TrainState(everywhere, shardings, opt_shardings, everywhere)

  has_master = isinstance(jax.eval_shape(optimizer.init, shapes), MasterState)
  start_dtype = jnp.dtype(jnp.float32) if has_master else dtype

  def init(rng):
    return cast(model.init(rng), start_dtype)

  def start(params, rng):
    return init_state(params, optimizer, rng)._replace(params=cast(params, dtype))

  rng_shape = jax.ShapeDtypeStruct((2,), jnp.uint32)
  return StatePlan(
    params=place(shapes, shardings),
    state=place(jax.eval_shape(start, shapes, rng_shape), all_shardings),
    start_dtype=start_dtype,
    init=jax.jit(init, out_shardings=shardings),
    start=jax.jit(start, out_shardings=all_shardings, donate_argnums=0),
  )


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes of arrays on one device, given shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
