"""Tokenizer folders, read by transformers."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Loaded(NamedTuple):
  """A tokenizer folder as read by transformers.

  Attributes:
    encoder: Text of a tokenizer.json that contains every token.
    special_tokens: Texts of special tokens, by the names that chat templates use.
    chat_template: A Jinja source, several sources by name, or None.
  """

  encoder: str
  special_tokens: dict[str, str]
  chat_template: Any


def load_with_transformers(files: Mapping[str, bytes], name: str, *, plain: bool) -> Loaded:
  """Reads a tokenizer folder with transformers.

  Args:
    files: Files of the folder by name; the folder itself may be remote.
    name: Name of the folder, for messages.
    plain: Whether to use tokenizer.json unchanged, whatever `tokenizer_class` and the model's
      config.json say.

  Raises:
    ValueError: The folder cannot be read.
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
    except Exception as error:  # unknown files can make transformers raise any exception
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
  """Imports transformers without its advice to install PyTorch, and suppresses its warnings."""
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  verbosity = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()
  try:
    yield transformers
  finally:
    transformers.logging.set_verbosity(verbosity)
