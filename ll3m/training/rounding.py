"""Parameters in bfloat16 without the loss of updates below a unit in the last place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

# Methods of updating bfloat16 parameters; the help of `bf16_update` gives their costs.
UPDATES = ("nearest", "stochastic", "master")


class MasterState(NamedTuple):
  """State of an optimizer that keeps a float32 copy of the parameters.

  Attributes:
    master: Parameters in float32.
    inner: State of the optimizer that updates the copy.
  """

  master: Any
  inner: Any


def with_master(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns the rule with a float32 copy of the parameters in its state.

  The updates are those of the copy, so `state.master` must be passed to `update` as `params`.
  """

  def init(params):
    master = to_float32(params)
    return MasterState(master, rule.init(master))

  def update(gradients, state, params):
    updates, inner = rule.update(gradients, state.inner, params)
    return updates, MasterState(optax.apply_updates(params, updates), inner)

  return optax.GradientTransformation(init, update)


def to_float32(tree: Any) -> Any:
  """Casts all floating-point arrays to float32."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def cast_stochastically(new: Any, like: Any, key: Array) -> Any:
  """Casts arrays to the dtypes of others, with `round_stochastically` for bfloat16.

  Args:
    new: Arrays in float32.
    like: Arrays of the same structure, in the target dtypes.
    key: Random key; each array gets its own, by its place in the tree.

  Returns:
    `new` in the dtypes of `like`.
  """
  leaves, structure = jax.tree.flatten(new)
  keys = jax.random.split(key, len(leaves))

  def cast(x, old, key):
    return round_stochastically(x, key) if old.dtype == jnp.bfloat16 else x.astype(old.dtype)

  return jax.tree.unflatten(
    structure, [cast(*each) for each in zip(leaves, jax.tree.leaves(like), keys, strict=True)]
  )


def round_stochastically(x: Array, key: Array) -> Array:
  """Rounds float32 to one of the two neighbouring bfloat16 values, such that the mean is exact.

  A bfloat16 is the upper half of a float32. With l the lower half, the value is rounded away from
  zero with probability l / 2^16, namely if the sum of l and 16 random bits carries. The random
  bits depend on the key and on the index of an element, not on its device.

  Args:
    x: Values in float32; non-finite values are unchanged.
    key: Random key.

  Returns:
    Values in bfloat16.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = ((bits + noise) >> 16).astype(jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
