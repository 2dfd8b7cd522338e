"""Names, shapes and orientation of a family's tensors in Hugging Face checkpoints, as data.

A `Rule` maps an LL3M parameter to tensors of a checkpoint. LL3M stacks parameters over layers and
stores linear weights as [in, out]; Hugging Face has one tensor per layer and stores [out, in].
Conversion and export use the same rules, so each is the inverse of the other.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from ll3m.core.model_config import ModelConfig, Stack

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
    part: The parameter's place among those that share the tensor, whose rows follow each other;
      None if the tensor has no other.
  """

  ours: str
  hf: str
  shape: Callable[[ModelConfig], tuple[int, ...]]
  transpose: bool = False
  when: Callable[[ModelConfig], bool] = lambda config: True
  part: int | None = None

  @property
  def stacked(self) -> bool:
    """Whether the parameter has a leading layer axis."""
    return _LAYER in self.hf


@dataclasses.dataclass(frozen=True)
class TensorSpec:
  """The specification of a checkpoint tensor, or of the rows of one that a parameter contains.

  Attributes:
    ours: The LL3M parameter that contains the tensor.
    layer: The index along the parameter's leading axis; None if the parameter is not stacked.
    shape: The shape of the tensor, or of its rows, in the checkpoint.
    transpose: Whether the parameter holds the tensor's transpose.
    tensor: The tensor's name in the checkpoint.
    first_row: The first of its rows.
  """

  ours: str
  layer: int | None
  shape: tuple[int, ...]
  transpose: bool
  tensor: str
  first_row: int = 0


def expected_tensors(rules: Sequence[Rule], config: ModelConfig) -> dict[str, TensorSpec]:
  """Returns the specifications of all tensors of a config's checkpoint.

  Returns:
    The specifications by tensor name. If several parameters share a tensor, each part has an entry
    of its own, named `tensor[first row:last row]`.
  """
  specs = {}
  ends: dict[str, int] = {}  # the rows of shared tensors that have an owner
  for rule in rules:
    if not rule.when(config):
      continue
    shape = rule.shape(config)
    shape = shape[::-1] if rule.transpose else shape
    for ours, place, tensor in _places(rule, config):
      first = ends.get(tensor, 0)
      ends[tensor] = first + shape[0]
      name = tensor if rule.part is None else f"{tensor}[{first}:{first + shape[0]}]"
      specs[name] = TensorSpec(ours, place, shape, rule.transpose, tensor, first)
  return specs


def shared_tensors(specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
  """Returns the names of the parts of each tensor that several parameters share."""
  parts: dict[str, list[str]] = {}
  for name, spec in specs.items():
    if name != spec.tensor:
      parts.setdefault(spec.tensor, []).append(name)
  return parts


def parameter_shapes(rules: Sequence[Rule], config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every LL3M parameter (stacked), by "module/name"."""
  shapes = {}
  for rule in rules:
    if not rule.when(config):
      continue
    if not rule.stacked:
      shapes[rule.ours] = rule.shape(config)
      continue
    for stack in config.stacks:
      shapes[_in_stack(rule, stack)] = (len(stack.layers), *rule.shape(config))
  return shapes


def _places(rule: Rule, config: ModelConfig) -> Iterator[tuple[str, int | None, str]]:
  """Yields the parameter, the index along its leading axis and the tensor, in layer order."""
  if not rule.stacked:
    yield rule.ours, None, rule.hf
    return
  places = sorted(
    (layer, _in_stack(rule, stack), place)
    for stack in config.stacks
    for place, layer in enumerate(stack.layers)
  )
  for layer, ours, place in places:
    yield ours, place, rule.hf.replace(_LAYER, str(layer))


def _in_stack(rule: Rule, stack: Stack) -> str:
  return stack.prefix + rule.ours.removeprefix("layers/")
