"""Names, shapes and orientation of a family's tensors in Hugging Face checkpoints, as data.

A `Rule` maps an LL3M parameter to tensors of a checkpoint. LL3M stacks parameters over layers and
stores linear weights as [in, out]; Hugging Face has one tensor per layer and stores [out, in].
Conversion and export use the same rules, so each is the inverse of the other.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from ll3m.core.model_config import ModelConfig

_LAYER = "{layer}"
_REST = "rest_"  # layers after the last whole repetition of the pattern; see models.transformer


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
    The specifications by tensor name. Of a tensor that several parameters share, each part has an
    entry of its own, named `tensor[first row:last row]`.
  """
  specs = {}
  ends: dict[str, int] = {}  # the rows of shared tensors that have an owner
  for rule in rules:
    if not rule.when(config):
      continue
    shape = rule.shape(config)
    shape = shape[::-1] if rule.transpose else shape
    for layer in range(config.num_layers) if rule.stacked else [None]:
      tensor = rule.hf.replace(_LAYER, str(layer))
      ours, place = _place(rule.ours, layer, config)
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
  rest = config.num_rest_layers
  for rule in rules:
    if not rule.when(config):
      continue
    shape = rule.shape(config)
    if not rule.stacked:
      shapes[rule.ours] = shape
      continue
    shapes[rule.ours] = (config.num_layers - rest, *shape)
    if rest:
      shapes[f"{_REST}{rule.ours}"] = (rest, *shape)
  return shapes


def _place(ours: str, layer: int | None, config: ModelConfig) -> tuple[str, int | None]:
  """Returns the parameter that contains a layer, and the layer's index in it."""
  repeated = config.num_layers - config.num_rest_layers
  if layer is None or layer < repeated:
    return ours, layer
  return f"{_REST}{ours}", layer - repeated
