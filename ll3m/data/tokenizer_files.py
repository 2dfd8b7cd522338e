"""The files of a tokenizer folder, read with the same precedence as in transformers.

The special tokens, added tokens and chat template of a folder may be named in six files, which may
disagree. If they do, the loader of transformers reads the folder. Folders without such conflicts,
including those that LL3M writes, are read without importing transformers, which takes a second.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from absl import logging
from etils import epath

from ll3m.data.config import TOKENIZER_NAMES
from ll3m.data.transformers_loader import load_with_transformers

ENCODER = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
CONFIG = "config.json"

# Other files from which transformers can build an encoder.
_VOCABULARIES = ("vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tokenizer.bpe.model")
# Named tokens, as in `PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES`.
NAMED_TOKENS = (
  "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# Classes that use tokenizer.json unchanged.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Settings that change which tokens a class adds, or how it builds its encoder.
_DECIDING = (
  "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "auto_map",
  "model_specific_special_tokens", "fast_tokenizer_files", "split_special_tokens",
)  # fmt: skip


_WARNED: set[str] = set()


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """Contents of a tokenizer's files, with all conflicts between them resolved.

  Attributes:
    name: Name of the folder or file, for messages.
    encoder: Text of a tokenizer.json that contains every token.
    special_tokens: Texts of special tokens, by the names that chat templates use ("bos_token",
      ...).
    chat_templates: Jinja sources by name: "default" and possibly "tool_use".
    settings: Other settings that are copied to an exported folder, such as `model_max_length`.
    sentencepiece: The `tokenizer.model` beside the encoder, or from which it was built.
    as_found: Whether the encoder is an unchanged tokenizer.json.
  """

  name: str
  encoder: str
  special_tokens: dict[str, str]
  chat_templates: dict[str, str]
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  sentencepiece: bytes | None = None
  as_found: bool = False

  def with_tokens(self, tokens: Sequence[str]) -> "TokenizerFiles":
    """Returns the files with the tokens that are not in the vocabulary appended to it."""
    if not tokens:
      return self
    encoder = _parse(self.encoder, self.name)
    present = encoder.get_vocab(with_added_tokens=True)
    added = [tokenizers.AddedToken(t, normalized=False) for t in tokens if t not in present]
    encoder.add_tokens(added)
    # A tokenizer.model beside the encoder would not contain the new tokens.
    return dataclasses.replace(
      self, encoder=encoder.to_str(), sentencepiece=None if added else self.sentencepiece
    )

  def contents(self) -> dict[str, bytes]:
    """Returns the files of a folder that every version of transformers reads in the same way."""
    settings = self.settings | {"tokenizer_class": _PLAIN_CLASSES[0]} | self.special_tokens
    templates = self.chat_templates
    if templates.keys() == {"default"}:
      settings["chat_template"] = templates["default"]
    elif templates:
      settings["chat_template"] = [
        {"name": name, "template": source} for name, source in templates.items()
      ]
    files = {
      ENCODER: self.encoder.encode(),
      SETTINGS: (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    return files | ({} if self.sentencepiece is None else {SENTENCEPIECE: self.sentencepiece})


def read_tokenizer_files(
  path: epath.Path, *, config_dir: epath.Path | None = None
) -> TokenizerFiles:
  """Reads a tokenizer folder, a tokenizer.json, a SentencePiece model, or a checkpoint's folder.

  Args:
    path: The folder or file.
    config_dir: Folder of the tokenizer's config.json; by default, the tokenizer folder itself.

  Raises:
    FileNotFoundError: The path does not exist or is not a tokenizer.
    ValueError: A file is damaged, or transformers cannot read the folder.
    NotImplementedError: A SentencePiece model is of an unsupported kind.
  """
  if not path.exists():
    raise FileNotFoundError(
      f"no tokenizer at {os.fspath(path)!r}: expected one of {', '.join(TOKENIZER_NAMES)}, a "
      "SentencePiece file or a Hugging Face tokenizer folder"
    )
  if not path.is_dir():
    if path.name == ENCODER:
      return read_tokenizer_files(path.parent, config_dir=config_dir)
    return _from_sentencepiece(path.read_bytes(), os.fspath(path), {}, None)
  folder, name = path, os.fspath(path)
  files = {file: folder / file for file in (ENCODER, SENTENCEPIECE) if (folder / file).exists()}
  if not files and not any((folder / file).exists() for file in _VOCABULARIES):
    if (folder / "tokenizer").is_dir():  # a converted checkpoint or a run
      return read_tokenizer_files(folder / "tokenizer", config_dir=config_dir or folder / "hf")
    raise FileNotFoundError(
      f"{name} is not a tokenizer folder: it has neither {ENCODER} nor {SENTENCEPIECE}"
    )
  companions = _companions(folder, config_dir or folder)
  settings = {file: parse_json(companions.get(file), folder / file) for file in (
    SETTINGS, SPECIAL_TOKENS, ADDED_TOKENS)}  # fmt: skip
  if ENCODER not in files and SENTENCEPIECE in files:
    found = _from_sentencepiece(
      files[SENTENCEPIECE].read_bytes(), name, settings[SETTINGS], companions
    )
  else:
    source = _decode(files[ENCODER].read_bytes(), name, ENCODER) if ENCODER in files else None
    if source is not None and _is_plain(source, name, settings, companions):
      found = _read_plain(source, name, settings[SETTINGS], companions)
    else:
      found = _read_with_transformers(folder, companions)
  _report_disagreement(found, settings, companions)
  return found


def _from_sentencepiece(
  serialized: bytes,
  name: str,
  settings: Mapping[str, Any],
  companions: Mapping[str, bytes] | None,
) -> TokenizerFiles:
  from ll3m.data import spm_conversion  # imports SentencePiece's protocol buffers

  proto = spm_conversion.parse_model(serialized, name)
  special = spm_conversion.special_tokens(proto)
  if "eos_token" not in special and "eos_token" not in settings:
    raise ValueError(f"SentencePiece model {name} must have an EOS piece, got none")
  encoder = spm_conversion.build_encoder(proto, legacy=bool(settings.get("legacy")))
  found = TokenizerFiles(name, encoder.to_str(), special, {}, sentencepiece=serialized)
  if companions and companions.keys() != {CONFIG}:
    # transformers reads the other files together with the encoder built here.
    said = {k: v for k, v in settings.items() if k not in ("tokenizer_class", "auto_map")}
    said = special | said | {"tokenizer_class": _PLAIN_CLASSES[0]}
    files = {k: v for k, v in companions.items() if k != CONFIG}
    files |= {ENCODER: found.encoder.encode(), SETTINGS: json.dumps(said).encode()}
    read = _decide(files, name)
    found = dataclasses.replace(read, sentencepiece=serialized)
  if settings.get("add_bos_token") is not False and "bos_token" in found.special_tokens:
    found = dataclasses.replace(found, encoder=_with_bos(found))
  return found


def _with_bos(files: TokenizerFiles) -> str:
  encoder, bos = _parse(files.encoder, files.name), files.special_tokens["bos_token"]
  encoder.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, encoder.token_to_id(bos))]
  )
  return encoder.to_str()


def _companions(folder: epath.Path, config_dir: epath.Path) -> dict[str, bytes]:
  """Reads the small files that determine how an encoder is used."""
  files = {name: folder / name for name in (SETTINGS, SPECIAL_TOKENS, ADDED_TOKENS, TEMPLATE)}
  files[CONFIG] = config_dir / CONFIG
  found = {name: file.read_bytes() for name, file in files.items() if file.exists()}
  for file in sorted((folder / TEMPLATES).glob("*.jinja")) if (folder / TEMPLATES).is_dir() else ():
    found[f"{TEMPLATES}/{file.name}"] = file.read_bytes()
  return found


def _is_plain(
  source: str,
  name: str,
  settings: Mapping[str, Mapping[str, Any]],
  companions: Mapping[str, bytes],
) -> bool:
  """Returns whether transformers would use tokenizer.json unchanged, without adding tokens."""
  said, named = settings[SETTINGS], settings[SPECIAL_TOKENS]
  if not _has_plain_class(said, companions) or settings[ADDED_TOKENS]:
    return False
  if any(said.get(key) for key in _DECIDING):
    return False
  if any(key.endswith("_token") and key not in NAMED_TOKENS and isinstance(value, str)
         for key, value in said.items()):  # fmt: skip
    return False  # a special token whose name is not in NAMED_TOKENS
  ours, theirs = _named_tokens(said), _named_tokens(named)
  if theirs != {key: ours.get(key) for key in theirs} or named.keys() - theirs.keys():
    return False
  try:
    added = json.loads(source).get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special")}
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f"{name}/{ENCODER} cannot be read: {error}") from error
  return special.issuperset(ours.values())


def _has_plain_class(said: Mapping[str, Any], companions: Mapping[str, bytes]) -> bool:
  tokenizer_class = said.get("tokenizer_class")
  # If no class is named, the model's config.json determines it.
  return CONFIG not in companions if tokenizer_class is None else tokenizer_class in _PLAIN_CLASSES


def _read_plain(
  source: str, name: str, said: Mapping[str, Any], companions: Mapping[str, bytes]
) -> TokenizerFiles:
  if TEMPLATE in companions:
    templates = {"default": _decode(companions[TEMPLATE], name, TEMPLATE)}
  else:
    templates = _templates(said.get("chat_template"))
  for file in companions:
    if file.startswith(f"{TEMPLATES}/"):
      templates[Path(file).stem] = _decode(companions[file], name, file)
  special = _named_tokens(said)
  return TokenizerFiles(name, source, special, templates, _travelling(said), as_found=True)


def _read_with_transformers(folder: epath.Path, companions: Mapping[str, bytes]) -> TokenizerFiles:
  files = dict(companions)
  for file in folder.iterdir():
    if file.name in (ENCODER, SENTENCEPIECE, "merges.txt", *_VOCABULARIES):
      files[file.name] = file.read_bytes()
  found = _decide(files, os.fspath(folder))
  return dataclasses.replace(found, sentencepiece=files.get(SENTENCEPIECE))


def _decide(files: Mapping[str, bytes], name: str) -> TokenizerFiles:
  said = parse_json(files.get(SETTINGS), Path(name) / SETTINGS)
  if ENCODER in files:
    _parse(files[ENCODER].decode(), name)  # for its more precise error message
  found = load_with_transformers(files, name, plain=_has_plain_class(said, files))
  templates = _templates(found.chat_template)
  return TokenizerFiles(name, found.encoder, found.special_tokens, templates, _travelling(said))


def _report_disagreement(
  found: TokenizerFiles,
  settings: Mapping[str, Mapping[str, Any]],
  companions: Mapping[str, bytes],
) -> None:
  """Logs which file takes precedence if files name different tokens or templates."""
  for token in ("eos_token", "bos_token", "pad_token"):
    said = {file: named for file in (SETTINGS, SPECIAL_TOKENS)
            if (named := _named_tokens(settings[file]).get(token))}  # fmt: skip
    if len(set(said.values())) > 1:
      winner = next((file for file, named in said.items()
                     if named == found.special_tokens.get(token)), ENCODER)  # fmt: skip
      names = "; ".join(f"{file} names {name}" for file, name in said.items())
      chosen = found.special_tokens.get(token)
      warn_once(found.name, f"the {token} is {chosen}, from {winner}, as in transformers ({names})")
  template = settings[SETTINGS].get("chat_template")
  if template and TEMPLATE in companions and found.chat_templates.get("default") != template:
    message = f"the chat template is from {TEMPLATE}, as in transformers; {SETTINGS} has another"
    warn_once(found.name, message)


def warn_once(name: str, message: str) -> None:
  """Logs a warning about a folder, unless the same warning was logged before, e.g. for a copy."""
  if message not in _WARNED:
    _WARNED.add(message)
    logging.warning("%s: %s", name, message)


def _travelling(said: Mapping[str, Any]) -> dict[str, Any]:
  keys = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces",
          "model_input_names")  # fmt: skip
  return {key: said[key] for key in keys if key in said}


def _named_tokens(said: Mapping[str, Any]) -> dict[str, str]:
  tokens = {}
  for name in NAMED_TOKENS:
    value = said.get(name)
    if isinstance(value, dict):  # a serialised AddedToken
      value = value.get("content")
    if isinstance(value, str):
      tokens[name] = value
  return tokens


def _templates(template: Any) -> dict[str, str]:
  try:
    if isinstance(template, list):  # several, by name
      template = {item["name"]: item["template"] for item in template}
  except (KeyError, TypeError):
    pass
  if template is None:
    return {}
  templates = template if isinstance(template, dict) else {"default": template}
  if not all(isinstance(text, str) for item in templates.items() for text in item):
    raise ValueError(
      f"{SETTINGS}: chat_template must be text, or a list of "
      f'{{"name": ..., "template": ...}}, got {str(template)[:80]!r}'
    )
  return dict(templates)


def _decode(content: bytes, name: str, file: str) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f"{name}/{file} is not UTF-8 text: {error}") from error


def _parse(source: str, name: str) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(source)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{name}/{ENCODER} cannot be read: {error}") from error


def parse_json(content: bytes | None, file: os.PathLike[str]) -> dict[str, Any]:
  """Parses a JSON object without its null values; {} if there is no file.

  Raises:
    ValueError: The content is not a JSON object.
  """
  if content is None:
    return {}
  try:
    found = json.loads(content)
  except ValueError as error:
    raise ValueError(f"{os.fspath(file)} is not JSON: {error}") from error
  if not isinstance(found, dict):
    raise ValueError(f"{os.fspath(file)} must hold an object, got {type(found).__name__}")
  return {key: value for key, value in found.items() if value is not None}
