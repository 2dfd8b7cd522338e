"""Stacks of layers against the kinds of layers, counted one by one."""

import hypothesis
import hypothesis.strategies as st

from ll3m.core.layer_stacks import LayerKind, shortest_cycle, stacks_of
from ll3m.families import get_preset

KINDS = (LayerKind(None, "global"), LayerKind(4, "local"), LayerKind(None, None))


@hypothesis.given(
  pattern=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), num_layers=st.integers(1, 20)
)
def test_the_stacks_hold_every_layer_once_in_the_order_of_the_model(pattern, num_layers):
  stacks = stacks_of(pattern, num_layers)
  assert len({stack.prefix for stack in stacks}) == len(stacks)
  assert sorted(layer for stack in stacks for layer in stack.layers) == list(range(num_layers))
  for stack in stacks:
    assert all(stack.kind == pattern[layer % len(pattern)] for layer in stack.layers)
  # The order of the decoder: all runs of the pattern, as often as it is repeated, then the rest.
  order = []
  repeated = [stack for stack in stacks if not stack.is_rest]
  for repetition in range(num_layers // len(pattern)):
    for stack in repeated:
      order += stack.layers[repetition * stack.run : (repetition + 1) * stack.run]
  order += [layer for stack in stacks if stack.is_rest for layer in stack.layers]
  assert order == list(range(num_layers))


def test_gemma_3_has_one_stack_for_each_kind_and_one_for_the_rest():
  stacks = get_preset("gemma3_1b").config.stacks
  assert [(s.prefix, s.run, len(s.layers)) for s in stacks] == [
    ("layers_0/", 5, 20), ("layers_1/", 1, 4), ("rest_layers/", 2, 2),
  ]  # fmt: skip
  assert stacks[1].layers == (5, 11, 17, 23)
  assert stacks[2].layers == (24, 25)


def test_a_model_of_one_kind_has_one_stack():
  (stack,) = get_preset("llama3_8b").config.stacks
  assert (stack.prefix, stack.layers) == ("layers/", tuple(range(32)))


def test_shortest_cycle():
  assert shortest_cycle("aab" * 3 + "a") == tuple("aab")
  assert shortest_cycle("aabb") == tuple("aabb")
  assert shortest_cycle("aaaa") == ("a",)
