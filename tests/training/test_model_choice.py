"""Options of the model that must agree with a checkpoint, and those that may differ."""

import types

import pytest

from ll3m import families
from ll3m.training.model_choice import ModelOptions, check_same_model, choose_model

LLAMA = families.get_preset("llama2_7b").config


def source(**changes):
  return types.SimpleNamespace(family="llama", config=LLAMA.replace(**changes))


def test_without_options_the_model_is_the_checkpoints():
  chosen = choose_model(ModelOptions(), source(max_positions=64))
  assert chosen.family.name == "llama" and chosen.config.max_positions == 64


def test_explicit_updates_may_differ_where_the_weights_stay_the_same():
  options = ModelOptions(
    update_model_config="max_positions=8192,rope_theta=5e5,rope_scaling_factor=2"
  )
  config = choose_model(options, source()).config
  assert (config.max_positions, config.rope_theta, config.rope_scaling_factor) == (8192, 5e5, 2.0)
  options = ModelOptions(load_model_config="llama_7b", update_model_config="max_positions=8192")
  assert choose_model(options, source()).config.max_positions == 8192


def test_a_preset_does_not_silently_override_the_checkpoint():
  """The checkpoint was trained with a different base of the rotary frequencies."""
  with pytest.raises(ValueError, match="rope_theta .*500000.0 .*10000.0"):
    choose_model(ModelOptions(load_model_config="llama2_7b"), source(rope_theta=5e5))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (ModelOptions(load_model_config="gemma_2b"), "llama .*gemma"),
    (ModelOptions(load_model_config="llama2_13b"), "d_model .*4096 .*5120"),
    (ModelOptions(update_model_config="tie_embeddings=True"), "tie_embeddings .*False .*True"),
  ],
)
def test_a_different_model_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    choose_model(options, source())


def test_a_model_without_checkpoint_must_be_named():
  with pytest.raises(ValueError, match="`load_model_config` must be given"):
    choose_model(ModelOptions())


def test_all_differences_are_listed():
  with pytest.raises(ValueError, match="d_ff is 1 .*; num_layers is 2"):
    check_same_model(LLAMA, LLAMA.replace(d_ff=1, num_layers=2))
