import dataclasses
import json
import re

import pytest

from ll3m.core.model_config import ModelConfig, apply_updates

TINY = ModelConfig(
  vocab_size=31,
  d_model=20,
  d_ff=28,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=10,
  max_positions=16,
  norm_epsilon=1e-5,
)

LLAMA3 = {
  "rope_scaling": "llama3",
  "rope_scaling_factor": 8.0,
  "rope_original_positions": 8,
  "rope_frequency_factors": (1.0, 4.0),
}


def test_equal_patterns_of_layers_are_equal_configs():
  long = TINY.replace(num_layers=6, sliding_window=4, layer_types=("sliding", "full") * 3)
  assert long == TINY.replace(num_layers=6, sliding_window=4, layer_types=("sliding", "full"))
  assert TINY.replace(sliding_window=4, layer_types=("full",) * 2) == TINY
  assert TINY.replace(sliding_window=4, layer_types=["sliding"]) == TINY.replace(sliding_window=4)
  restored = ModelConfig.from_dict(json.loads(json.dumps(long.to_dict())))
  assert restored == long and hash(restored) == hash(long)


def test_updates_may_hold_tuples():
  updates = "layer_types=('sliding', 'full'),sliding_window=3, num_layers=4"
  config = apply_updates(TINY, updates)
  assert config.all_layer_types == ("sliding", "full", "sliding", "full")
  assert [kind.window for kind in config.layer_kinds] == [3, None, 3, None]


def test_defaults_are_those_of_llama():
  assert (TINY.norm, TINY.activation, TINY.gated_mlp) == ("rms", "silu", True)
  assert (TINY.rope_theta, TINY.rotary_fraction, TINY.sliding_window) == (1e4, 1.0, None)
  switches = (TINY.parallel_block, TINY.use_bias, TINY.tie_embeddings, TINY.scale_embeddings)
  assert not any(switches)


def test_derived_dimensions():
  assert TINY.rotary_dim == 10
  assert TINY.replace(head_dim=80, rotary_fraction=0.4).rotary_dim == 32  # phi-2


def test_is_frozen_and_hashable():
  with pytest.raises(dataclasses.FrozenInstanceError):
    TINY.d_model = 8
  assert hash(TINY) == hash(TINY.replace())


def test_integers_become_floats_in_float_fields():
  config = TINY.replace(rope_theta=100_000)
  assert config == TINY.replace(rope_theta=1e5)
  assert type(config.rope_theta) is float


def test_dict_round_trip_through_json():
  config = TINY.replace(sliding_window=5, norm="layer", rotary_fraction=0.4, use_bias=True)
  assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"d_model": 0}, "d_model must be positive, got 0"),
    ({"num_layers": -1}, "num_layers must be positive, got -1"),
    ({"d_ff": 10**400}, "d_ff must be at most 2147483647, got 100000... (401 digits)"),
    ({"norm_epsilon": 0.0}, "norm_epsilon must be positive, got 0.0"),
    ({"norm_epsilon": float("nan")}, "norm_epsilon must be finite, got nan"),
    ({"rope_theta": float("inf")}, "rope_theta must be finite, got inf"),
    ({"rope_scaling_factor": 0.5}, "rope_scaling_factor must be at least 1, got 0.5"),
    ({"norm_scale_offset": float("nan")}, "norm_scale_offset must be finite, got nan"),
    ({"rotary_fraction": float("nan")}, "rotary_fraction must be finite"),
    ({"d_ff": 2.5}, "d_ff must be int, got 2.5"),
    ({"d_ff": "28"}, "d_ff must be int, got '28'"),
    ({"d_ff": True}, "d_ff must be int, got True"),
    ({"rope_theta": "big"}, "rope_theta must be float, got 'big'"),
    ({"gated_mlp": 1}, "gated_mlp must be bool, got 1"),
    ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
    ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, gelu, got 'relu'"),
    ({"num_kv_heads": 3}, "num_heads (4) must be a multiple of num_kv_heads (3)"),
    ({"num_kv_heads": 8}, "num_heads (4) must be a multiple of num_kv_heads (8)"),
    ({"head_dim": 9}, "an even number of the 9 head dimensions, got 1.0 (9 of them)"),
    ({"rotary_fraction": 0.3}, "an even number of the 10 head dimensions, got 0.3 (3 of them)"),
    ({"rotary_fraction": 1.2}, "rotary_fraction must rotate an even number"),
    ({"rotary_fraction": 0.0}, "rotary_fraction must rotate an even number"),
    ({"sliding_window": 0}, "sliding_window must be positive, got 0"),
    ({"sliding_window": 4.0}, "sliding_window must be int | None, got 4.0"),
    ({"norm_position": "first"}, "norm_position must be one of before, after, both, got 'first'"),
    ({"qk_norm": "all"}, "qk_norm must be one of None, per_head, all_heads, got 'all'"),
    ({"parallel_block": True, "norm_position": "both"}, "a parallel_block has one norm before it"),
    ({"rope_scaling": "ntk"}, "rope_scaling must be one of linear, llama3, yarn, longrope"),
    ({"rope_scaling": "llama3"}, "rope_original_positions must be given for llama3 scaling"),
    ({"rope_original_positions": 8}, "rope_original_positions must be None for linear scaling"),
    (
      {"rope_scaling": "llama3", "rope_original_positions": 8},
      "rope_frequency_factors must have 2 numbers for llama3 scaling",
    ),
    (
      LLAMA3 | {"rope_frequency_factors": (4.0, 1.0)},
      "rope_frequency_factors must be increasing, got (4.0, 1.0)",
    ),
    (LLAMA3 | {"rope_frequency_factors": (0.0, 4.0)}, "rope_frequency_factors must be positive"),
    (LLAMA3 | {"rope_original_positions": 1}, "rope_original_positions must be at least 2"),
    (LLAMA3 | {"rope_magnitude": 1.1}, "rope_magnitude must be None for llama3 scaling"),
    (
      {"rope_scaling": "longrope", "rope_original_positions": 8, "rope_short_factors": (1.0,)},
      "rope_short_factors must have ",
    ),
    ({"layer_types": ("full", "odd")}, "layer_types must be of full, sliding, no_rope, got odd"),
    ({"layer_types": "full"}, "layer_types must be a list of str, got 'full'"),
    ({"layer_types": ("full", "sliding")}, "sliding_window must be given for layers of type"),
    ({"attention_soft_cap": 0.0}, "attention_soft_cap must be positive, got 0.0"),
  ],
)
def test_invalid_values_are_refused(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    TINY.replace(**changes)


def test_from_dict_names_missing_and_unknown_fields():
  fields = TINY.to_dict()
  with pytest.raises(ValueError, match=r"model config lacks d_ff, head_dim$"):
    ModelConfig.from_dict({k: v for k, v in fields.items() if k not in ("head_dim", "d_ff")})
  with pytest.raises(ValueError, match=r"'head_dims' \(did you mean 'head_dim'\?\)"):
    ModelConfig.from_dict(fields | {"head_dims": 4})


@pytest.mark.parametrize(
  ("updates", "changes"),
  [
    ("", {}),
    ("num_layers=3", {"num_layers": 3}),
    (" num_layers = 3 , d_ff=7,", {"num_layers": 3, "d_ff": 7}),
    ("rope_theta=1e6", {"rope_theta": 1e6}),
    ("rope_theta=500_000", {"rope_theta": 5e5}),
    ("sliding_window=None", {"sliding_window": None}),
    ("sliding_window=none", {"sliding_window": None}),
    ("tie_embeddings=True,gated_mlp=false", {"tie_embeddings": True, "gated_mlp": False}),
    ("norm=layer,activation='gelu'", {"norm": "layer", "activation": "gelu"}),
  ],
)
def test_apply_updates(updates, changes):
  config = TINY.replace(sliding_window=4)
  assert apply_updates(config, updates) == config.replace(**changes)


@pytest.mark.parametrize(
  ("updates", "message"),
  [
    ("num_layer=3", "unknown model config field 'num_layer' (did you mean 'num_layers'?)"),
    ("zzz=3", "unknown model config field 'zzz'"),
    ("num_layers", "expected key=value,..., got 'num_layers'"),
    ("num_layers=", "expected key=value,..., got 'num_layers='"),
    ("=3", "expected key=value,..., got '=3'"),
    ("num_layers=2.5", "num_layers must be int, got 2.5"),
    ("d_ff=2*14", "d_ff must be int, got '2*14'"),
    ("d_ff=print", "d_ff must be int, got 'print'"),
    ("num_kv_heads=3", "num_heads (4) must be a multiple of num_kv_heads (3)"),
  ],
)
def test_apply_updates_refuses_invalid_updates(updates, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    apply_updates(TINY, updates)


def test_apply_updates_evaluates_nothing(tmp_path):
  victim = tmp_path / "victim"
  victim.touch()
  with pytest.raises(ValueError, match="d_ff must be int"):
    apply_updates(TINY, f"d_ff=__import__('os').remove({str(victim)!r})")
  assert victim.exists()
