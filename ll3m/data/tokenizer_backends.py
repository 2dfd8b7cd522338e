"""The two kinds of tokenizer: a Hugging Face folder and a SentencePiece model."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, SupportsInt, override

from etils import epath

from ll3m.data.tokenizer import CUT, Tokenizer, cut_controls

# What a tokenizer folder may hold; all of it travels.
_FOLDER_FILES = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
  "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip


class HuggingFaceTokenizer(Tokenizer):
  """A folder with tokenizer.json, read with the `tokenizers` library."""

  def __init__(self, folder: str | os.PathLike[str], extra_tokens: Sequence[str] = ()):
    self._folder = folder = epath.Path(folder)
    self._source = (folder / "tokenizer.json").read_text()
    self._extra_tokens = tuple(extra_tokens)
    if extra_tokens:  # from here on it is the tokenizer with them, as it will be saved
      self._source = self._build().to_str(pretty=True)
    settings = read_settings(folder)
    self.special_tokens = _special_tokens(settings)
    self.chat_template = _chat_template(folder, settings)
    self.eos_id = self._required_id("eos_token", folder)
    # Whether a text starts with BOS is the post-processor's say alone, as in transformers 5.
    bos = self.token_id(self.special_tokens.get("bos_token", ""))
    self.bos_id = bos if bos in self._trusting.encode("").ids else None
    self.vocab_size = 1 + max(self._plain.get_vocab(with_added_tokens=True).values())
    added = self._trusting.get_added_tokens_decoder()
    self._control_ids = {i for i, token in added.items() if token.special}
    self.control_tokens = _longest_first(added[i].content for i in self._control_ids)
    self.fingerprint = _fingerprint(self._source, self.bos_id, self.eos_id)

  @functools.cached_property
  def _plain(self) -> Any:
    """The encoder for users' text: control tokens are split like any other characters."""
    encoder = self._build()
    encoder.encode_special_tokens = True
    return encoder

  @functools.cached_property
  def _trusting(self) -> Any:
    """The encoder for templates: control tokens count."""
    return self._build()

  def _build(self) -> Any:
    import tokenizers

    try:
      encoder = tokenizers.Tokenizer.from_str(self._source)
    except Exception as error:  # the library raises bare Exception
      raise ValueError(f"{self._folder}/tokenizer.json cannot be read: {error}") from error
    encoder.no_padding()
    encoder.no_truncation()
    encoder.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in self._extra_tokens])
    return encoder

  def _required_id(self, name: str, folder: epath.Path) -> int:
    token = self.special_tokens.get(name)
    token_id = None if token is None else self.token_id(token)
    if token_id is None:
      raise ValueError(f"tokenizer {folder} must name its {name}, found {token!r}")
    return token_id

  @override
  def encode(self, text: str) -> list[int]:
    ids = self._encode_plain(text)
    if self._control_ids.isdisjoint(ids):
      return ids
    # A model that holds its control strings as pieces (Unigram) can still arrive at them; text
    # that is cut inside of each cannot.
    pieces = cut_controls(text, self.control_tokens).split(CUT)
    return [i for piece in pieces for i in self._encode_plain(piece)]

  def _encode_plain(self, text: str) -> list[int]:
    # The batched call, unlike encode(), lets other Python threads run meanwhile.
    return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids

  @override
  def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = self._trusting.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  @override
  def decode(self, ids: Iterable[SupportsInt], *, keep_control: bool = False) -> str:
    return self._trusting.decode([int(i) for i in ids], skip_special_tokens=not keep_control)

  @override
  def token_id(self, token: str) -> int | None:
    return self._trusting.token_to_id(token)

  @override
  def files(self) -> dict[str, bytes]:
    found = (self._folder / name for name in _FOLDER_FILES if (self._folder / name).exists())
    files = {file.name: file.read_bytes() for file in found}
    return files | ({"tokenizer.json": self._source.encode()} if self._extra_tokens else {})


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model file (`tokenizer.model`)."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    extra_tokens: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
  ):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    serialized = epath.Path(path).read_bytes()
    try:
      model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
      present = {piece.piece for piece in model.pieces}
      for token in (t for t in extra_tokens if t not in present):
        model.pieces.add(piece=token, score=0.0, type=model.SentencePiece.Type.USER_DEFINED)
      self._serialized = model.SerializeToString()
      self._model = sentencepiece.SentencePieceProcessor(model_proto=self._serialized)
    except Exception as error:  # protobuf's DecodeError and sentencepiece's RuntimeError
      raise ValueError(f"{os.fspath(path)} is not a SentencePiece model: {error}") from error
    self._settings = settings = settings or {}
    self.eos_id = self._model.eos_id()
    if self.eos_id < 0:
      raise ValueError(f"SentencePiece model {os.fspath(path)} must have an EOS piece, has none")
    has_bos = self._model.bos_id() >= 0 and settings.get("add_bos_token") is not False
    self.bos_id = self._model.bos_id() if has_bos else None
    self.vocab_size = self._model.get_piece_size()
    self.special_tokens = {"eos_token": self._model.id_to_piece(self.eos_id)}
    if has_bos:
      self.special_tokens["bos_token"] = self._model.id_to_piece(self.bos_id)
    self.control_tokens = _longest_first(
      self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)
    )
    self.fingerprint = _fingerprint(self._serialized, self.bos_id, self.eos_id)

  @override
  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  @override
  def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    raise NotImplementedError(
      "chat templates need a tokenizer folder with tokenizer.json, got a SentencePiece model"
    )

  @override
  def decode(self, ids: Iterable[SupportsInt], *, keep_control: bool = False) -> str:
    ids = [int(i) for i in ids if 0 <= i < self.vocab_size]
    if not keep_control:
      return self._model.decode(ids)
    return "".join(
      self._model.id_to_piece(i) if self._model.is_control(i) else self._model.decode([i])
      for i in ids
    )

  @override
  def token_id(self, token: str) -> int | None:
    token_id = self._model.piece_to_id(token)
    return None if self._model.is_unknown(token_id) else token_id

  @override
  def files(self) -> dict[str, bytes]:
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": self.bos_id is not None}
    settings |= self.special_tokens | self._settings
    return {
      "tokenizer.model": self._serialized,
      "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


def read_settings(folder: epath.Path) -> dict[str, Any]:
  """Returns tokenizer_config.json over special_tokens_map.json.

  Raises:
    ValueError: one of them is no JSON object.
  """
  settings = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).exists():
      try:
        found = json.loads((folder / name).read_text())
      except ValueError as error:
        raise ValueError(f"{folder / name} is not JSON: {error}") from error
      if not isinstance(found, dict):
        raise ValueError(f"{folder / name} must hold an object, got {type(found).__name__}")
      settings |= {key: value for key, value in found.items() if value is not None}
  return settings


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
  tokens = {}
  for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
    value = settings.get(name)
    if isinstance(value, dict):  # a serialised AddedToken
      value = value.get("content")
    if isinstance(value, str):
      tokens[name] = value
  return tokens


def _chat_template(folder: epath.Path, settings: dict[str, Any]) -> str | None:
  if (folder / "chat_template.jinja").exists():
    return (folder / "chat_template.jinja").read_text()
  template = settings.get("chat_template")
  if isinstance(template, list):  # several, by name
    template = {item["name"]: item["template"] for item in template}.get("default")
  return template


def _longest_first(tokens: Iterable[str]) -> tuple[str, ...]:
  return tuple(sorted(tokens, key=len, reverse=True))


def _fingerprint(source: str | bytes, *parts: Any) -> str:
  data = source.encode() if isinstance(source, str) else source
  return hashlib.sha256(data + repr(parts).encode()).hexdigest()[:16]
