"""Names, shapes and orientation of a family's tensors in Hugging Face checkpoints, as data.

A `Rule` says where one of our parameters lives in a checkpoint. Ours are stacked over layers and
hold linear weights as [in, out]; Hugging Face names a tensor per layer and holds [out, in]. The
same rules run forwards (convert) and backwards (export), so neither can know more than the other.
"""

import dataclasses
from collections.abc import Callable, Sequence

from ll3m.core.model_config import ModelConfig

_LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Rule:
  """One parameter of ours and the checkpoint tensors it is made of.

  Attributes:
    ours: "module/name", e.g. "layers/attention/query/w"; stacked over layers if hf is per layer.
    hf: the tensor's name; `{layer}` stands for the layer's number.
    shape: the shape of one layer of ours (without L), from the config.
    transpose: the checkpoint holds the transposed matrix.
    when: whether the config has this parameter at all.
  """

  ours: str
  hf: str
  shape: Callable[[ModelConfig], tuple[int, ...]]
  transpose: bool = False
  when: Callable[[ModelConfig], bool] = lambda config: True

  @property
  def stacked(self) -> bool:
    """Whether ours has a leading axis of layers."""
    return _LAYER in self.hf


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """What one tensor of a checkpoint must be.

  Attributes:
    ours: the parameter that it belongs to.
    layer: its index along the parameter's leading axis; None if ours is not stacked.
    shape: its shape in the checkpoint.
    transpose: whether ours is its transpose.
  """

  ours: str
  layer: int | None
  shape: tuple[int, ...]
  transpose: bool


def expected_tensors(rules: Sequence[Rule], config: ModelConfig) -> dict[str, TensorSpec]:
  """Returns every tensor that a checkpoint of this config holds, by its name there."""
  specs = {}
  for rule in rules:
    if not rule.when(config):
      continue
    shape = rule.shape(config)
    shape = shape[::-1] if rule.transpose else shape
    for layer in range(config.num_layers) if rule.stacked else [None]:
      name = rule.hf.replace(_LAYER, str(layer))
      specs[name] = TensorSpec(rule.ours, layer, shape, rule.transpose)
  return specs


def parameter_shapes(rules: Sequence[Rule], config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter of ours (stacked), by "module/name"."""
  return {
    rule.ours: (config.num_layers,) * rule.stacked + rule.shape(config)
    for rule in rules
    if rule.when(config)
  }
