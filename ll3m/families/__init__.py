"""The model families, one module each, and lookup by preset name or config.json."""

import difflib
import json
import re
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
# What people add to the name of a model, without changing its architecture.
_ADDED = re.compile(r"^meta-|-(instruct|chat|it|pt|base|hf|v1\.0|\d{4}|gguf)$")


def _plain(name: str) -> str:
  """Returns a name without organisation, case and what `_ADDED` matches."""
  name = name.rpartition("/")[2].lower().replace("_", "-")
  while (shorter := _ADDED.sub("", name)) != name:
    name = shorter
  return name


_NAMES = {
  _plain(alias): name
  for family in FAMILIES.values()
  for alias, name in [*family.aliases.items(), *((name, name) for name in family.presets)]
}


def find_preset(name: str) -> Preset | None:
  """Returns a published model by any of its names; None if there is none.

  The name may be a preset's ("llama3.2_1b") or that of a repository on the Hugging Face Hub
  ("meta-llama/Llama-3.2-1B-Instruct"), in any case.
  """
  found = name if name in PRESETS else _NAMES.get(_plain(name))
  return PRESETS[found] if found else None


def get_preset(name: str) -> Preset:
  """Returns a published model by any of its names; see `find_preset`.

  Raises:
    ValueError: The name is unknown.
  """
  if (found := find_preset(name)) is not None:
    return found
  near = difflib.get_close_matches(_plain(name), _NAMES, n=1)
  suggestion = f" (did you mean {_NAMES[near[0]]!r}?)" if near else ""
  raise ValueError(f"unknown model {name!r}{suggestion}; known: {', '.join(sorted(PRESETS))}")


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
  known = [family.model_type for family in FAMILIES.values()]
  near = did_you_mean(str(kind), known)
  raise ValueError(f"config.json has model_type {kind!r}{near}; expected one of {', '.join(known)}")


def load(name_or_path: str) -> Preset:
  """Returns a preset by name, or reads the config.json at a path (or in a folder).

  Raises:
    ValueError: The argument is neither a known name nor the path of a readable config.json.
  """
  path = epath.Path(name_or_path)
  if find_preset(name_or_path) is not None or not path.exists():
    return get_preset(name_or_path)
  if path.is_dir():
    path = path / "config.json"
  try:
    hf = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"cannot read {path} as a config.json: {error}") from error
  return from_hf_config(hf)
