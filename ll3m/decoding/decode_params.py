"""Parameters as decoding wants them: taken apart into layers, and how they lie on a mesh.

Dimensions: D model, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ll3m.core.model_config import ModelConfig
from ll3m.core.sharding import parameter_spec
from ll3m.models.kernels import Kernels
from ll3m.models.transformer import Params

# Matrices that read the same input, and the one that they become.
_JOINED = {
  "attention/query_key_value": ("attention/query", "attention/key", "attention/value"),
  "mlp/gate_up": ("mlp/gate", "mlp/up"),
}


class Weights(NamedTuple):
  """Parameters, taken apart for decoding by `unstack`.

  Attributes:
    layers: of each layer, with joined matrices.
    ends: embedding, final norm and head.
  """

  layers: list[Params]
  ends: Params


def joins(kernels: Kernels) -> bool:
  """Returns whether matrices that read the same input are joined to one.

  Not where heads are split: a device's share of the joined one would be other columns than its
  shares of the parts, and what comes out would have to be moved.
  """
  return kernels.sharding is None or kernels.sharding.head_shards == 1


def unstack(config: ModelConfig, params: Params, dtype: Any, *, joined: bool = True) -> Weights:
  """Takes the layers apart and joins the matrices that read the same input.

  XLA:CPU copies a layer's slice out of the stack at every step, and small products do not fill
  its threads: SmolLM2 decoded 12.6 tokens/s stacked, 22 with arrays per layer, 38 joined.

  Args:
    config: the architecture.
    params: stacked over layers, as `models.transformer.make_model` has them.
    dtype: of the result.
    joined: see `joins`.
  """
  prefix = "layers/"
  stacked = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
  groups = {module: (module,) for module in stacked}
  for name, members in _JOINED.items() if joined else ():
    if all(member in stacked for member in members):
      groups = {k: v for k, v in groups.items() if k not in members} | {name: members}
  ends = {
    module: {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    for module, arrays in params.items()
    if not module.startswith(prefix)
  }
  # A plain (not gated) network keeps its single matrix: `mlp/up` under either name.
  layers = [
    {
      module: {
        name: jnp.concatenate(
          [jnp.asarray(stacked[member][name][layer], dtype) for member in members], axis=-1
        )
        for name in stacked[members[0]]
      }
      for module, members in groups.items()
    }
    for layer in range(config.num_layers)
  ]
  return Weights(layers, ends)


def shardings(weights: Weights, mesh: Mesh) -> Weights:
  """Returns a `NamedSharding` for each of the weights (arrays or shapes), as training has them."""

  def place(params: Params, *, is_layer: bool) -> dict[str, dict[str, NamedSharding]]:
    placed: dict[str, dict[str, NamedSharding]] = {}
    for module, arrays in params.items():
      first = _JOINED.get(module, (module,))[0]  # what is joined lies as its first part does
      prefix = "layers/" if is_layer else ""
      placed[module] = {}
      for name, x in arrays.items():
        spec = parameter_spec(f"{prefix}{first}/{name}", (1,) * is_layer + x.shape, mesh)
        placed[module][name] = NamedSharding(mesh, PartitionSpec(*spec[is_layer:]))
    return placed

  layers = [place(params, is_layer=True) for params in weights.layers]
  return Weights(layers, place(weights.ends, is_layer=False))


def place_weights(weights: Weights, mesh: Mesh) -> Weights:
  """Moves weights to where they belong on a mesh."""
  return jax.tree.map(jax.device_put, weights, shardings(weights, mesh))
