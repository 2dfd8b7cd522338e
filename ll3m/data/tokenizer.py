"""Tokenizers: SentencePiece files and Hugging Face tokenizer folders, behind one interface.

No TensorFlow and no transformers here, so that commands which only need text in and text out
start quickly; `vocabularies.py` wraps these for seqio.

Text of users never yields control tokens: "</s>" in a document is ordinary characters.
"""

import abc
import os
from collections.abc import Iterable, Sequence
from typing import SupportsInt

from etils import epath

from ll3m.data.config import TOKENIZER_NAMES, TokenizerConfig

# Stands where a control string in users' text is cut. A Unicode noncharacter: no text that is meant
# for interchange holds it.
CUT = "\ufdd0"


def cut_controls(text: str, controls: Iterable[str]) -> str:
  """Puts CUT behind the first character of every control string in a text."""
  for control in controls:
    text = text.replace(control, control[:1] + CUT + control[1:])
  return text


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
  def decode(self, ids: Iterable[SupportsInt], *, keep_control: bool = False) -> str:
    """Returns the text of ids; control tokens are left out unless `keep_control`."""

  @abc.abstractmethod
  def token_id(self, token: str) -> int | None:
    """Returns the id of a token given by its text, or None."""

  @abc.abstractmethod
  def files(self) -> dict[str, bytes]:
    """Returns the files of a tokenizer folder that `load_tokenizer` and transformers read."""

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Makes a folder that holds this tokenizer and nothing else.

    Files of another one beside it would win, or change how it is read.
    """
    files, folder = self.files(), epath.Path(folder)
    if folder.exists():
      folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)  # TensorFlow may still take it for there
    for name, content in files.items():
      (folder / name).write_bytes(content)

  @property
  def prefix(self) -> list[int]:
    """What stands before every document: [BOS] or nothing."""
    return [] if self.bos_id is None else [self.bos_id]


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


def find_fault(folder: epath.Path, embedding_size: int) -> str | None:
  """Says why the tokenizer that travels with a checkpoint cannot serve it; None if it can.

  Args:
    folder: its files.
    embedding_size: V, rows of the embedding.
  """
  try:
    load_tokenizer(TokenizerConfig(), checkpoint_dir=folder, embedding_size=embedding_size)
  except (ValueError, OSError) as error:
    return str(error)
  return None


def _open(path: epath.Path, extra_tokens: Sequence[str]) -> Tokenizer:
  # Imported here, because they are built on this module's Tokenizer.
  from ll3m.data.tokenizer_backends import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    read_settings,
  )

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
    return SentencePieceTokenizer(path / "tokenizer.model", extra_tokens, read_settings(path))
  if (path / "tokenizer").is_dir():  # a converted checkpoint or a run
    return _open(path / "tokenizer", extra_tokens)
  raise FileNotFoundError(
    f"{os.fspath(path)} holds neither tokenizer.json nor tokenizer.model, so it is no tokenizer"
  )
