"""Token ids that end a generated text, from the files of a model."""

import os

from etils import epath

from ll3m.data.tokenizer_files import CONFIG, parse_json, warn_once

GENERATION_CONFIG = "generation_config.json"


def eos_ids(config_dir: epath.Path | None) -> list[int]:
  """Returns the token ids that end a generated text according to the model's files, or [].

  As in transformers, generation_config.json is used if it exists, else config.json.

  Args:
    config_dir: Folder of both files, or None.
  """
  found: dict[str, list[int]] = {}
  for file in (CONFIG, GENERATION_CONFIG):
    if config_dir is not None and (config_dir / file).exists():
      config = parse_json((config_dir / file).read_bytes(), config_dir / file)
      value = config.get("eos_token_id", [])
      found[file] = value if isinstance(value, list) else [value]
      if not all(type(i) is int for i in found[file]):
        raise ValueError(
          f"{os.fspath(config_dir / file)}: eos_token_id must be an id or a list of ids, got "
          f"{value!r}"
        )
  if len(found) == 2 and found[CONFIG] and set(found[CONFIG]) != set(found[GENERATION_CONFIG]):
    warn_once(
      f"{config_dir}",
      f"generation ends at the ids {found[GENERATION_CONFIG]} of {GENERATION_CONFIG}, as in "
      f"transformers; {CONFIG} names {found[CONFIG]}",
    )
  return found.get(GENERATION_CONFIG, found.get(CONFIG, []))
