"""The model families, one module each, and lookup by preset name or config.json."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from ll3m.core.model_config import ModelConfig, did_you_mean
from ll3m.families import gemma, gemma2, gemma3, llama, mistral, olmo2, phi, phi3, qwen, smollm3
from ll3m.families.family import Family

_ALL = (
  llama.FAMILY, mistral.FAMILY, gemma.FAMILY, phi.FAMILY, qwen.QWEN2, qwen.QWEN3, gemma2.FAMILY,
  gemma3.FAMILY, phi3.FAMILY, smollm3.FAMILY, olmo2.FAMILY,
)  # fmt: skip
FAMILIES = {family.name: family for family in _ALL}


class Preset(NamedTuple):
  """A published model: its family and its architecture."""

  family: Family
  config: ModelConfig


PRESETS = {
  name: Preset(family, config)
  for family in FAMILIES.values()
  for name, config in family.presets.items()
}
ALIASES = {alias: name for family in FAMILIES.values() for alias, name in family.aliases.items()}


def get_preset(name: str) -> Preset:
  """Returns a published model by its name or alias.

  Raises:
    ValueError: The name is unknown.
  """
  known = [*PRESETS, *ALIASES]
  if name not in known:
    raise ValueError(
      f"unknown model {name!r}{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
    )
  return PRESETS[ALIASES.get(name, name)]


def from_hf_config(hf: Mapping[str, Any]) -> Preset:
  """Returns the family and the architecture described by a parsed config.json.

  Raises:
    ValueError: The family is unknown, or a value is invalid.
    NotImplementedError: The file requires a feature that LL3M's models do not support.
  """
  kind = hf.get("model_type")
  for family in FAMILIES.values():
    if family.model_type == kind:
      return Preset(family, family.from_hf_config(hf))
  known = ", ".join(family.model_type for family in FAMILIES.values())
  raise ValueError(f"config.json has model_type {kind!r}; expected one of {known}")


def load(name_or_path: str) -> Preset:
  """Returns a preset by name, or reads the config.json at a path (or in a folder).

  Raises:
    ValueError: The argument is neither a known name nor the path of a readable config.json.
  """
  path = epath.Path(name_or_path)
  if name_or_path in PRESETS or name_or_path in ALIASES or not path.exists():
    return get_preset(name_or_path)
  if path.is_dir():
    path = path / "config.json"
  try:
    hf = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"cannot read {path} as a config.json: {error}") from error
  return from_hf_config(hf)
