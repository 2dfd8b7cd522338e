"""Parameters for decoding: unstacked into layers, and sharded over a mesh.

Dimensions: D model, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ll3m.core.model_config import ModelConfig
from ll3m.core.sharding import parameter_spec
from ll3m.models.kernels import Kernels
from ll3m.models.transformer import Params, select

# Joined matrices, and the matrices with the same input that each of them consists of.
_JOINED = {
  "attention/query_key_value": ("attention/query", "attention/key", "attention/value"),
  "mlp/gate_up": ("mlp/gate", "mlp/up"),
}


class Weights(NamedTuple):
  """Parameters unstacked by `unstack`.

  Attributes:
    layers: The parameters of each layer, with joined matrices.
    ends: The parameters of the embedding, the final norm and the head.
  """

  layers: list[Params]
  ends: Params


def joins(kernels: Kernels) -> bool:
  """Returns whether matrices that read the same input are joined into one.

  They are not if heads are sharded: a device's shard of the joined matrix would hold other columns
  than its shards of the parts, and the outputs would have to be moved between devices.
  """
  return kernels.sharding is None or kernels.sharding.head_shards == 1


def unstack(config: ModelConfig, params: Params, dtype: Any, *, joined: bool = True) -> Weights:
  """Unstacks the layers and joins the matrices that read the same input.

  XLA:CPU copies a layer's slice out of the stack at every step, and small products do not use all
  threads: SmolLM2 decoded 12.6 tokens/s stacked, 22 with arrays per layer, 38 joined.

  Args:
    config: The architecture.
    params: The parameters, stacked over layers as in `models.transformer.make_model`.
    dtype: The dtype of the result.
    joined: Whether to join matrices; see `joins`.
  """
  stacks = [(stack, select(params, stack.prefix)) for stack in config.stacks]
  modules = stacks[0][1]  # all stacks have the same
  groups = {module: (module,) for module in modules}
  for name, members in _JOINED.items() if joined else ():
    if all(member in modules for member in members):
      groups = {k: v for k, v in groups.items() if k not in members} | {name: members}
  prefixes = tuple(stack.prefix for stack in config.stacks)
  ends = {
    module: {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    for module, arrays in params.items()
    if not module.startswith(prefixes)
  }
  # A plain (not gated) network keeps its single matrix `mlp/up`.
  layers = {
    layer: {
      module: {
        name: jnp.concatenate(
          [jnp.asarray(own[member][name][place], dtype) for member in members], axis=-1
        )
        for name in own[members[0]]
      }
      for module, members in groups.items()
    }
    for stack, own in stacks
    for place, layer in enumerate(stack.layers)
  }
  layers = [layers[layer] for layer in range(config.num_layers)]
  return Weights(layers, ends)


def shardings(weights: Weights, mesh: Mesh) -> Weights:
  """Returns a `NamedSharding` for each of the weights (arrays or shapes), as in training."""

  def place(params: Params, *, is_layer: bool) -> dict[str, dict[str, NamedSharding]]:
    placed: dict[str, dict[str, NamedSharding]] = {}
    for module, arrays in params.items():
      first = _JOINED.get(module, (module,))[0]  # a joined matrix is sharded like its first part
      prefix = "layers/" if is_layer else ""
      placed[module] = {}
      for name, x in arrays.items():
        spec = parameter_spec(f"{prefix}{first}/{name}", (1,) * is_layer + x.shape, mesh)
        placed[module][name] = NamedSharding(mesh, PartitionSpec(*spec[is_layer:]))
    return placed

  layers = [place(params, is_layer=True) for params in weights.layers]
  return Weights(layers, place(weights.ends, is_layer=False))


def place_weights(weights: Weights, mesh: Mesh) -> Weights:
  """Moves weights to their shardings on a mesh."""
  return jax.tree.map(jax.device_put, weights, shardings(weights, mesh))
