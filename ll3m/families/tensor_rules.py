"""Names, shapes and orientation of a family's tensors in Hugging Face checkpoints, as data.

A `Rule` maps an LL3M parameter to tensors of a checkpoint. LL3M stacks parameters over layers and
stores linear weights as [in, out]; Hugging Face has one tensor per layer and stores [out, in].
Conversion and export use the same rules, so each is the inverse of the other.
"""

import dataclasses
from collections.abc import Callable, Sequence

from ll3m.core.model_config import ModelConfig

_LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Rule:
  """An LL3M parameter and the corresponding checkpoint tensors.

  Attributes:
    ours: The parameter's "module/name", e.g. "layers/attention/query/w"; stacked over layers if
      `hf` contains `{layer}`.
    hf: The tensor's name; `{layer}` is replaced by the layer number.
    shape: Function from the config to the parameter's shape in one layer (without L).
    transpose: Whether the checkpoint stores the transposed matrix.
    when: Function from the config to whether it has this parameter.
  """

  ours: str
  hf: str
  shape: Callable[[ModelConfig], tuple[int, ...]]
  transpose: bool = False
  when: Callable[[ModelConfig], bool] = lambda config: True

  @property
  def stacked(self) -> bool:
    """Whether the parameter has a leading layer axis."""
    return _LAYER in self.hf


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """The specification of a checkpoint tensor.

  Attributes:
    ours: The LL3M parameter that contains the tensor.
    layer: The index along the parameter's leading axis; None if the parameter is not stacked.
    shape: The tensor's shape in the checkpoint.
    transpose: Whether the parameter holds the tensor's transpose.
  """

  ours: str
  layer: int | None
  shape: tuple[int, ...]
  transpose: bool


def expected_tensors(rules: Sequence[Rule], config: ModelConfig) -> dict[str, TensorSpec]:
  """Returns the specifications of all tensors of a config's checkpoint, by tensor name."""
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
  """Returns the shape of every LL3M parameter (stacked), by "module/name"."""
  return {
    rule.ours: (config.num_layers,) * rule.stacked + rule.shape(config)
    for rule in rules
    if rule.when(config)
  }
