"""Edits LL3M's copy of a tokenizer folder, and the token ids in the config files beside it."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from ll3m.data.generation_config import GENERATION_CONFIG
from ll3m.data.tokenizer import Tokenizer
from ll3m.data.tokenizer_files import CONFIG, read_tokenizer_files

# Keys that transformers' `generate()` reads from config.json and generation_config.json.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Generation settings with token ids or stop strings, which are valid for one tokenizer only.
_OF_ONE_TOKENIZER = (
  "bad_words_ids", "begin_suppress_tokens", "constraints", "force_words_ids",
  "forced_decoder_ids", "sequence_bias", "stop_strings", "suppress_tokens",
)  # fmt: skip


def retarget_settings(folder: epath.Path, tokenizer: Tokenizer) -> None:
  """Replaces the token ids in a folder's config files by those of another tokenizer.

  Other settings that hold ids or texts of the previous tokenizer are removed.

  Args:
    folder: The folder of config.json and generation_config.json; either may be missing.
    tokenizer: The new tokenizer.
  """
  for name in (CONFIG, GENERATION_CONFIG):
    if (folder / name).exists():
      settings = json.loads((folder / name).read_text())
      settings = {
        key: value
        for key, value in settings.items()
        if not key.endswith("_token_id") and key not in _OF_ONE_TOKENIZER
      }
      settings |= token_ids({}, tokenizer)
      (folder / name).write_text(json.dumps(settings, indent=2) + "\n")


def token_ids(settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, int | list[int]]:
  """Returns the ids of BOS, EOS and padding to write into a config file.

  A model trained by LL3M ends its texts with the tokenizer's EOS or with the token that ends a turn
  of its chat template. Generation must stop at these as well as at those that the file names.

  Args:
    settings: The present contents of the file; its ids come first.
    tokenizer: The run's tokenizer.
  """
  named = settings.get("eos_token_id")
  ends = list(named) if isinstance(named, list) else [] if named is None else [named]
  # EOS is the first of those that the file lacks, because some programs read only one.
  ends += [i for i in (tokenizer.eos_id, *sorted(tokenizer.stop_ids)) if i not in ends]
  found: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))}
  if len(found["eos_token_id"]) == 1:
    (found["eos_token_id"],) = found["eos_token_id"]
  for key in ("bos_token_id", "pad_token_id"):
    token = tokenizer.special_tokens.get(key.removesuffix("_id"))
    value = settings.get(key)
    if value is None and token is not None:
      value = tokenizer.token_id(token)
    if value is not None:
      found[key] = value
  return {key: found[key] for key in TOKEN_KEYS if key in found}


def settle_tokenizer(folder: epath.Path, config_dir: epath.Path) -> None:
  """Rewrites a tokenizer folder so that it is unambiguous and loads fast.

  A folder that is unambiguous or cannot be read stays unchanged; loading the tokenizer reports the
  error.

  Args:
    folder: The folder, LL3M's copy.
    config_dir: The folder of the tokenizer's config.json.
  """
  try:
    found = read_tokenizer_files(folder, config_dir=config_dir)
  except (ValueError, OSError, NotImplementedError):
    return
  if not found.as_found:
    contents = found.contents()
    folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
      (folder / name).write_bytes(content)
