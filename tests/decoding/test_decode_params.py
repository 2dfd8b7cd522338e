import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ll3m.core.sharding import make_mesh
from ll3m.decoding.decode_params import joins, place_weights, shardings, unstack
from ll3m.models.kernels import DEFAULT_KERNELS, Kernels
from tests.decoding.test_decoder import CONFIGS, random_params


def test_unstack_joins_matrices_without_changing_weights():
  config = CONFIGS["phi"].replace(gated_mlp=True)
  params = random_params(config)
  weights = unstack(config, params, jnp.float32)
  assert len(weights.layers) == config.num_layers
  for i, layer in enumerate(weights.layers):
    for name in ("w", "b"):
      parts = [params[f"layers/attention/{part}"][name][i] for part in ("query", "key", "value")]
      joined = layer["attention/query_key_value"][name]
      np.testing.assert_array_equal(joined, np.concatenate(parts, axis=-1))
      parts = [params[f"layers/mlp/{part}"][name][i] for part in ("gate", "up")]
      np.testing.assert_array_equal(layer["mlp/gate_up"][name], np.concatenate(parts, axis=-1))
    np.testing.assert_array_equal(layer["mlp/down"]["w"], params["layers/mlp/down"]["w"][i])
  assert set(weights.ends) == {"embed", "final_norm", "head"}


def test_matrices_are_joined_unless_heads_are_sharded():
  assert joins(DEFAULT_KERNELS) and joins(Kernels.on(make_mesh("2,4,1")))
  assert not joins(Kernels.on(make_mesh("1,4,2")))


def test_layers_are_sharded_like_their_stack():
  config = CONFIGS["phi"].replace(vocab_size=64, d_model=16)
  weights = unstack(config, random_params(config), jnp.float32, joined=False)
  placed = place_weights(weights, make_mesh("2,2,2"))
  jax.tree.map(np.testing.assert_array_equal, placed, weights)
  specs = jax.tree.map(lambda x: x.sharding.spec, placed)
  assert specs.ends["embed"]["embedding"] == P("mp", "fsdp")
  assert specs.ends["head"] == {"w": P("fsdp", "mp"), "b": P("mp")}
  for layer in specs.layers:
    assert layer["attention/query"] == {"w": P("fsdp", "mp"), "b": P("mp")}
    assert layer["attention/out"] == {"w": P("mp", "fsdp"), "b": P("fsdp")}
    assert layer["attention_norm"] == {"scale": P(None), "bias": P(None)}
  embedding = placed.ends["embed"]["embedding"]
  assert {shard.data.shape for shard in embedding.addressable_shards} == {(32, 8)}


def test_joined_matrices_are_sharded_like_their_parts():
  weights = unstack(CONFIGS["llama"], random_params(CONFIGS["llama"]), jnp.float32)
  found = shardings(weights, make_mesh("2,4,1"))
  assert found.layers[0]["attention/query_key_value"]["w"].spec == P("fsdp", "mp")
  assert found.layers[1]["mlp/gate_up"]["w"].spec == P("fsdp", "mp")
