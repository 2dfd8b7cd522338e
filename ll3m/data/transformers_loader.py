"""Tokenizer folders through the eyes of transformers."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Loaded(NamedTuple):
  """What transformers makes of a folder.

  Attributes:
    encoder: The text of a tokenizer.json that holds every token.
    special_tokens: The names that chat templates use and their text.
    chat_template: A Jinja source, several by name, or None.
  """

  encoder: str
  special_tokens: dict[str, str]
  chat_template: Any


def load_with_transformers(files: Mapping[str, bytes], name: str, *, plain: bool) -> Loaded:
  """Lets transformers read a folder.

  Args:
    files: The folder's files, by their names; the folder itself may be remote.
    name: The folder's name, for messages.
    plain: Whether to take tokenizer.json as it stands instead of letting `tokenizer_class` and the
      model's config.json decide.

  Raises:
    ValueError: it cannot.
  """
  with _quiet_transformers() as transformers, tempfile.TemporaryDirectory() as folder:
    for file, content in files.items():
      (Path(folder) / file).parent.mkdir(exist_ok=True)
      (Path(folder) / file).write_bytes(content)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
      if plain:  # AutoTokenizer needs a config.json
        found = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
      else:
        options["mistral_format"] = False
        found = transformers.AutoTokenizer.from_pretrained(folder, **options)
      encoder = found.backend_tokenizer
    except Exception as error:  # whatever a stranger's files make transformers raise
      reason = str(error).strip().splitlines() or [type(error).__name__]
      raise ValueError(
        f"transformers cannot read the tokenizer {name}: {reason[0].replace(folder, name)}"
      ) from error
  encoder.no_padding()
  encoder.no_truncation()
  special = {k: v for k, v in found.special_tokens_map.items() if isinstance(v, str)}
  return Loaded(encoder.to_str(), special, found.chat_template)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[ModuleType]:
  """Imports transformers without its advice to install PyTorch, and keeps its warnings back."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  verbosity = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()
  try:
    yield transformers
  finally:
    transformers.logging.set_verbosity(verbosity)
