"""The model families, one file each, and how to find one by preset, name or config.json."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from ll3m.core.model_config import ModelConfig, did_you_mean
from ll3m.families import gemma, llama, mistral, phi
from ll3m.families.family import Family

FAMILIES = {f.name: f for f in (llama.FAMILY, mistral.FAMILY, gemma.FAMILY, phi.FAMILY)}


class Preset(NamedTuple):
  """A model of a family."""

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
    ValueError: unknown name.
  """
  known = [*PRESETS, *ALIASES]
  if name not in known:
    raise ValueError(
      f"unknown model {name!r}{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
    )
  return PRESETS[ALIASES.get(name, name)]


def from_hf_config(hf: Mapping[str, Any]) -> Preset:
  """Finds the family of a parsed config.json and reads the architecture.

  Raises:
    ValueError: no such family, or a value that makes no sense.
    NotImplementedError: the file asks for something that the family's models here do not do.
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
    ValueError: neither a known name nor a readable config.json.
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
