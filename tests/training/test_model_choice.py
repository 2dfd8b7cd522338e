"""What the flags and a checkpoint must agree on."""

import types

import pytest

from ll3m import families
from ll3m.training.model_choice import ModelOptions, check_same_model, choose_model

LLAMA = families.get_preset("llama2_7b").config


def source(**changes):
  return types.SimpleNamespace(family="llama", config=LLAMA.replace(**changes))


def test_the_checkpoint_says_what_it_is():
  chosen = choose_model(ModelOptions(), source(max_positions=64))
  assert chosen.family.name == "llama" and chosen.config.max_positions == 64


def test_what_is_named_may_differ_where_the_weights_do_not_say():
  options = ModelOptions(
    update_model_config="max_positions=8192,rope_theta=5e5,rope_scaling_factor=2"
  )
  config = choose_model(options, source()).config
  assert (config.max_positions, config.rope_theta, config.rope_scaling_factor) == (8192, 5e5, 2.0)
  options = ModelOptions(load_model_config="llama_7b", update_model_config="max_positions=8192")
  assert choose_model(options, source()).config.max_positions == 8192


def test_a_preset_does_not_silently_change_how_weights_are_read():
  """The checkpoint was trained with another base of the rotary frequencies than the preset's."""
  with pytest.raises(ValueError, match="rope_theta is 500000.0 in the checkpoint and 10000.0 in"):
    choose_model(ModelOptions(load_model_config="llama2_7b"), source(rope_theta=5e5))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (ModelOptions(load_model_config="gemma_2b"), "holds a llama model, the run asks for gemma"),
    (ModelOptions(load_model_config="llama2_13b"), "d_model is 4096 in the checkpoint and 5120"),
    (ModelOptions(update_model_config="tie_embeddings=True"), "tie_embeddings is False in the"),
  ],
)
def test_another_model_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    choose_model(options, source())


def test_something_must_say_what_the_model_is():
  with pytest.raises(ValueError, match="`load_model_config` must be given"):
    choose_model(ModelOptions())


def test_differences_are_all_listed():
  with pytest.raises(ValueError, match="d_ff is 1 .*; num_layers is 2"):
    check_same_model(LLAMA, LLAMA.replace(d_ff=1, num_layers=2))
