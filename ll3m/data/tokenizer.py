"""Tokenizers: SentencePiece files and Hugging Face tokenizer folders, behind one interface.

No TensorFlow and no transformers here, so that commands which only need text in and text out
start quickly; `vocabularies.py` wraps these for seqio.

Text of users never yields control tokens: "</s>" in a document is ordinary characters.
"""

import abc
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, override

from etils import epath

from ll3m.data.config import TOKENIZER_NAMES, TokenizerConfig


class Tokenizer(abc.ABC):
  """Text to token ids and back.

  Attributes:
    bos_id: what the family puts before a document; None if nothing.
    eos_id: what ends a document.
    vocab_size: one more than the largest id.
    fingerprint: changes whenever the ids of some text may change.
    special_tokens: names that chat templates use ("bos_token", ...) and their text.
    control_tokens: texts that stand for something else than themselves, longest first.
    chat_template: Jinja source, or None.
  """

  bos_id: int | None
  eos_id: int
  vocab_size: int
  fingerprint: str
  special_tokens: dict[str, str]
  control_tokens: tuple[str, ...]
  chat_template: str | None = None

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without BOS and EOS; control tokens in it are plain text."""

  @abc.abstractmethod
  def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the ids of trusted text whose control tokens count, and their spans in characters.

    Raises:
      NotImplementedError: for a bare SentencePiece model, which has no such notion.
    """

  @abc.abstractmethod
  def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
    """Returns the text of ids; control tokens are left out unless `keep_control`."""

  @abc.abstractmethod
  def token_id(self, token: str) -> int | None:
    """Returns the id of a token given by its text, or None."""

  def encode_document(self, text: str) -> list[int]:
    """Returns the ids of a whole document: BOS (where the family has one) ... EOS."""
    return [*self.prefix, *self.encode(text), self.eos_id]

  @property
  def prefix(self) -> list[int]:
    """What stands before every document: [BOS] or nothing."""
    return [] if self.bos_id is None else [self.bos_id]


class HuggingFaceTokenizer(Tokenizer):
  """A folder with tokenizer.json, read with the `tokenizers` library."""

  def __init__(self, folder: str | os.PathLike[str], extra_tokens: Sequence[str] = ()):
    folder = epath.Path(folder)
    self._source = (folder / "tokenizer.json").read_text()
    self._extra_tokens = tuple(extra_tokens)
    settings = _read_settings(folder)
    self.special_tokens = _special_tokens(settings)
    self.chat_template = _chat_template(folder, settings)
    self.eos_id = self._required_id("eos_token", folder)
    # Whether a document starts with BOS is the file's post-processor's say, unless the
    # settings are explicit.
    head = self._trusting.encode("").ids
    bos = self.token_id(self.special_tokens.get("bos_token", ""))
    adds_bos = settings.get("add_bos_token")
    if not isinstance(adds_bos, bool):
      adds_bos = bos is not None and bos in head
    self.bos_id = bos if adds_bos else None
    self.vocab_size = 1 + max(self._plain.get_vocab(with_added_tokens=True).values())
    added = self._trusting.get_added_tokens_decoder().values()
    self.control_tokens = _longest_first(token.content for token in added if token.special)
    self.fingerprint = _fingerprint(self._source, self._extra_tokens, self.bos_id, self.eos_id)

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
      raise ValueError(f"tokenizer.json cannot be read: {error}") from error
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
    # The batched call, unlike encode(), lets other Python threads run meanwhile.
    return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids

  @override
  def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = self._trusting.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  @override
  def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
    return self._trusting.decode([int(i) for i in ids], skip_special_tokens=not keep_control)

  @override
  def token_id(self, token: str) -> int | None:
    return self._trusting.token_to_id(token)


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
      for token in extra_tokens:
        model.pieces.add(piece=token, score=0.0, type=model.SentencePiece.Type.USER_DEFINED)
      serialized = model.SerializeToString()
      self._model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    except Exception as error:  # protobuf's DecodeError and sentencepiece's RuntimeError
      raise ValueError(f"{os.fspath(path)} is not a SentencePiece model: {error}") from error
    settings = settings or {}
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
    self.fingerprint = _fingerprint(serialized, (), self.bos_id, self.eos_id)

  @override
  def encode(self, text: str) -> list[int]:
    return self._model.encode(text)

  @override
  def encode_template(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    raise NotImplementedError(
      "chat templates need a tokenizer folder with tokenizer.json, got a SentencePiece model"
    )

  @override
  def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
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


def load_tokenizer(
  config: TokenizerConfig,
  *,
  checkpoint_dir: str | os.PathLike[str] | None = None,
  family: str | None = None,
  embedding_size: int | None = None,
) -> Tokenizer:
  """Loads the tokenizer of a run.

  Args:
    config: which one, after gin had its say (`gin_settings.apply`).
    checkpoint_dir: the tokenizer folder that travels with the checkpoint, if there is one.
    family: the checkpoint's family, to which its tokenizer belongs.
    embedding_size: V, rows of the embedding that the ids index; None leaves it unchecked.

  Raises:
    FileNotFoundError: if there is no tokenizer where it should be.
    ValueError: if a named tokenizer is not the checkpoint's, or has more ids than the embedding.
  """
  named = config.type in TOKENIZER_NAMES
  path = config.path or (None if named else config.type)
  if path is None:
    if checkpoint_dir is None or not epath.Path(checkpoint_dir).exists():
      wanted = f"tokenizer {config.type!r}" if named else "a tokenizer"
      raise FileNotFoundError(
        f"{wanted} is needed and no checkpoint brings one: give --tokenizer.path (a "
        "SentencePiece file or Hugging Face tokenizer folder)"
      )
    if named and family is not None and family != config.type:
      raise ValueError(
        f"tokenizer {config.type!r} was asked for, but the checkpoint brings {family!r}'s: give "
        "--tokenizer.path for another one"
      )
    path = checkpoint_dir
  tokenizer = _open(epath.Path(path), config.extra_tokens)
  if embedding_size is not None and tokenizer.vocab_size > embedding_size:
    extra = f" ({len(config.extra_tokens)} of them extra tokens)" if config.extra_tokens else ""
    raise ValueError(
      f"the tokenizer's vocabulary is larger than the embedding: {tokenizer.vocab_size} ids"
      f"{extra}, {embedding_size} rows"
    )
  return tokenizer


def _open(path: epath.Path, extra_tokens: Sequence[str]) -> Tokenizer:
  if not path.exists():
    raise FileNotFoundError(
      f"no tokenizer at {os.fspath(path)!r}: expected one of {', '.join(TOKENIZER_NAMES)}, a "
      "SentencePiece file or a Hugging Face tokenizer folder"
    )
  if not path.is_dir():
    if path.name == "tokenizer.json":
      return HuggingFaceTokenizer(path.parent, extra_tokens)
    return SentencePieceTokenizer(path, extra_tokens)
  if (path / "tokenizer.json").exists():
    return HuggingFaceTokenizer(path, extra_tokens)
  if (path / "tokenizer.model").exists():
    return SentencePieceTokenizer(path / "tokenizer.model", extra_tokens, _read_settings(path))
  if (path / "tokenizer").is_dir():  # a converted checkpoint or a run
    return _open(path / "tokenizer", extra_tokens)
  raise FileNotFoundError(
    f"{os.fspath(path)} holds neither tokenizer.json nor tokenizer.model, so it is no tokenizer"
  )


def _read_settings(folder: epath.Path) -> dict[str, Any]:
  """Returns tokenizer_config.json over special_tokens_map.json."""
  settings = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).exists():
      settings |= {
        k: v for k, v in json.loads((folder / name).read_text()).items() if v is not None
      }
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
