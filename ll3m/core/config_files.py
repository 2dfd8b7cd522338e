"""Reader of --config files: YAML whose keys are options, nested or with dotted names.

  optimizer:
    type: adamw
    adamw_optimizer.lr: 1e-4

JSON is YAML, so a run's flags.json is such a file, too. Values are returned as the text in the
file, to be parsed by the option's type: YAML would read `no` as a boolean and `1:30` as 90.
"""

from collections.abc import Collection, Iterator
from typing import Any

import yaml
from etils import epath

from ll3m.core.model_config import did_you_mean

_NULL = "tag:yaml.org,2002:null"


def read(file: epath.PathLike, known: Collection[str]) -> dict[str, tuple[Any, str]]:
  """Reads a file of options.

  Args:
    file: The file, local or gs://.
    known: The dotted names of all options.

  Returns:
    For each option, by dotted name: its value (a string, a list of strings, or None for null) and
    its location "FILE:LINE".

  Raises:
    FileNotFoundError: The file does not exist.
    ValueError: The file is not YAML, is not a mapping of options, or has an unknown or repeated
      key.
  """
  path = epath.Path(file)
  if not path.exists() or path.is_dir():
    raise FileNotFoundError(f"`config`: no such file: {file}")
  try:
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    mark = getattr(error, "problem_mark", None)
    place = f"{file}:{mark.line + 1}" if mark else str(file)
    raise ValueError(
      f"`config`: {place} is not YAML: {getattr(error, 'problem', error)}"
    ) from error
  if root is None:
    return {}
  if not isinstance(root, yaml.MappingNode):
    raise ValueError(f"`config`: {file} must be a mapping of options, such as `total_steps: 100`")
  found: dict[str, tuple[Any, str]] = {}
  for name, line, node in _leaves(root, ""):
    place = f"{file}:{line}"
    if name not in known:
      raise ValueError(f"`config`: {place}: unknown key {name}{_hint(name, known)}")
    if name in found:
      raise ValueError(f"`config`: {place}: {name} is set twice, first at {found[name][1]}")
    found[name] = (_value(node, place, name), place)
  return found


def _leaves(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int, yaml.Node]]:
  """Yields the dotted name of every value, the line of its key, and its node."""
  for key, value in node.value:
    name = f"{prefix}{key.value}"
    if isinstance(value, yaml.MappingNode):
      yield from _leaves(value, f"{name}.")
    else:
      yield name, key.start_mark.line + 1, value


def _value(node: yaml.Node, place: str, name: str) -> str | list[str] | None:
  if isinstance(node, yaml.ScalarNode):
    return None if node.tag == _NULL else node.value
  if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
    raise ValueError(f"`config`: {place}: {name} must be a value or a list of values")
  return [item.value for item in node.value]


def _hint(name: str, known: Collection[str]) -> str:
  inside = [option for option in known if option.startswith(f"{name}.")]
  if inside:
    return f", which is a group of keys: {inside[0]}, ..."
  return did_you_mean(name, known)
