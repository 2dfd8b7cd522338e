"""Tokenizers: text to token ids and back.

No TensorFlow here, and transformers only for folders that need it (`tokenizer_files.py`), so that
commands which only need text in and text out start quickly; `vocabularies.py` wraps these for
seqio.

Text of users never yields control tokens: "</s>" in a document is ordinary characters. The encoder
knows control tokens by private names (`sealed_encoder.py`); where a chat template writes one, its
text is replaced by that name. So a text is always cut into tokens as a whole.
"""

import bisect
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int32

from ll3m.data import chat_template
from ll3m.data.config import TOKENIZER_NAMES, TokenizerConfig
from ll3m.data.generation_config import eos_ids
from ll3m.data.sealed_encoder import SEAL, build_sealed
from ll3m.data.tokenizer_files import (
  ENCODER,
  TokenizerFiles,
  read_tokenizer_files,
)

# Stands behind the first character of a control string in a user's text (`Tokenizer.quote`).
_QUOTE = SEAL[::-1] + "\ufdef"


class Tokenizer:
  """Text to token ids and back.

  Attributes:
    prefix: The ids that stand before every document: [BOS] or nothing.
    bos_id: The first of them; None for none.
    eos_id: The token that ends a document.
    stop_ids: The tokens that end a generated text: `eos_id`, those that the checkpoint's
      generation_config.json (else config.json) names, and those that end an assistant's turn.
    vocab_size: One more than the largest id.
    fingerprint: A hash that changes whenever the ids of some text or conversation may change.
    special_tokens: Names that chat templates use ("bos_token", ...) and their text.
    control_tokens: The texts of tokens that users' text never yields, longest first: special
      tokens, and those that the chat template begins and ends turns with.
    chat_templates: Jinja sources by name.
    control_ids: The ids of `control_tokens`.
    byte_ids: Tokens that stand for one byte each, whose text depends on the bytes beside them.
    silent_ids: Tokens that `decode` leaves out: those flagged special.
  """

  def __init__(self, files: TokenizerFiles, end_ids: Sequence[int] = ()):
    """Builds the encoder.

    Args:
      files: What the tokenizer's files say.
      end_ids: The ids that end a text by the model's own config files.

    Raises:
      ValueError: a file is damaged, or nothing says which token ends a text.
    """
    try:
      source = json.loads(files.encoder)
      added = {token["content"]: token for token in source.get("added_tokens") or []}
      vocabulary = source["model"]["vocab"]
      ids = {content: token["id"] for content, token in added.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f"{files.name}/{ENCODER} cannot be read: {error}") from error
    self.chat_templates = files.chat_templates
    self.special_tokens = dict(files.special_tokens)
    if "eos_token" not in self.special_tokens and end_ids:
      self.special_tokens["eos_token"] = _token_of(end_ids[0], ids, vocabulary)
    self._files = dataclasses.replace(files, special_tokens=self.special_tokens)
    turns = [
      chat_template.find_turn_tokens(template, self.special_tokens, added)
      for template in self.chat_templates.values()
    ]
    ends = {token for turn in turns for token in turn.ends}
    controls = {content for content, token in added.items() if token.get("special")}
    controls |= {token for turn in turns for token in turn.structure}
    controls |= added.keys() & set(self.special_tokens.values())
    controls |= {content for content, i in ids.items() if i in end_ids}
    self.control_tokens = tuple(sorted(controls, key=len, reverse=True))
    self._marks = re.compile("|".join(map(re.escape, [_QUOTE, *self.control_tokens])))
    self._encoder = build_sealed(source, controls, files.name)
    self._check_ids(ids)
    self.control_ids = frozenset(ids[token] for token in controls)
    eos = self.token_id(self.special_tokens.get("eos_token", ""))
    if eos is None:
      raise ValueError(
        f"tokenizer {files.name} must name its eos_token, found "
        f"{self.special_tokens.get('eos_token')!r}"
      )
    self.eos_id: int = eos
    # What stands before a text is the post-processor's say alone, as in transformers 5.
    self.prefix: list[int] = _ids_before_text(self._encoder)
    self.bos_id: int | None = self.prefix[0] if self.prefix else None
    self.stop_ids = frozenset({eos, *end_ids, *(ids[token] for token in ends)})
    vocab = self._encoder.get_vocab(with_added_tokens=True)
    self.vocab_size: int = 1 + max(vocab.values())
    self.silent_ids = frozenset(
      i for i, token in self._encoder.get_added_tokens_decoder().items() if token.special
    )
    has_bytes = "ByteFallback" in json.dumps(source.get("decoder"))
    self.byte_ids = frozenset(
      i for piece, i in vocab.items() if has_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
    )
    self.fingerprint = hashlib.sha256(
      repr(
        (files.encoder, self.bos_id, self.eos_id, self.special_tokens, self.chat_templates)
      ).encode()
    ).hexdigest()[:16]

  def _check_ids(self, ids: dict[str, int]) -> None:
    """Checks that the library gives added tokens the ids that the file says.

    It numbers those that are not in the vocabulary one after another, whatever the file says; a
    model would read another token's embedding.

    Raises:
      ValueError: it does not.
    """
    for content, said in ids.items():
      if (found := self.token_id(content)) != said:
        raise ValueError(
          f"{self._files.name}/{ENCODER} gives the added token {content!r} the id {said}, but it "
          f"is number {found} in the vocabulary: the ids of added tokens must follow each other"
        )

  @property
  def chat_template(self) -> str | None:
    """The template of conversations without tools, or None."""
    return self.chat_templates.get("default")

  def __call__(self, text: str) -> list[int]:
    """Returns the ids of a prompt: `prefix` and the text's."""
    return [*self.prefix, *self.encode(text)]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without BOS and EOS; control tokens in it are plain text."""
    # The batched call, unlike encode(), lets other Python threads run meanwhile.
    return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

  def encode_spans(
    self, text: str, spans: Sequence[tuple[int, int]]
  ) -> tuple[list[int], Int32[np.ndarray, "n"]]:
    """Tokenises a text as a whole and finds the tokens of some of its parts.

    A token belongs to a span if it holds any of its characters, as in the assistant mask of
    transformers: of "ASSISTANT: Yes", with the span of "Yes", the token " Yes".

    Args:
      text: The text; control tokens in it are plain text.
      spans: Begin and end of each part, in characters, in order.

    Returns:
      The ids, and for each 1 if it belongs to a span, else 0.
    """
    encoding = self._encoder.encode_batch([text], add_special_tokens=False)[0]
    return encoding.ids, _owned_by(spans, encoding)

  def quote(self, text: str) -> str:
    """Marks the control strings in a user's text as plain text, for `encode_rendered`."""
    return self._marks.sub(lambda match: match[0][:1] + _QUOTE + match[0][1:], text)

  def encode_rendered(
    self, text: str, spans: Sequence[tuple[int, int]] = ()
  ) -> tuple[list[int], Int32[np.ndarray, "n"]]:
    """Tokenises what a chat template wrote, as `encode_spans`; control tokens in it count.

    Args:
      text: The text; control strings that `quote` has marked are plain text.
      spans: As for `encode_spans`.
    """
    pieces, before, after, base, length = [], [0], [0], 0, 0
    for match in self._marks.finditer(text):
      name = "" if match[0] == _QUOTE else SEAL + match[0] + SEAL
      pieces += [text[base : match.start()], name]
      length += match.start() - base + len(name)
      base = match.end()
      before.append(base)
      after.append(length)
    pieces.append(text[base:])

    def moved(position: int) -> int:
      i = bisect.bisect_right(before, position) - 1
      return after[i] + position - before[i]

    return self.encode_spans("".join(pieces), [(moved(a), moved(b)) for a, b in spans])

  def decode(self, ids: Iterable[SupportsInt], *, keep_control: bool = False) -> str:
    """Returns the text of ids; special tokens are left out unless `keep_control`."""
    text = self._encoder.decode([int(i) for i in ids], skip_special_tokens=not keep_control)
    return text.replace(SEAL, "")

  def token_id(self, token: str) -> int | None:
    """Returns the id of a token given by its text, or None."""
    sealed = self._encoder.token_to_id(SEAL + token + SEAL)
    return self._encoder.token_to_id(token) if sealed is None else sealed

  def files(self) -> dict[str, bytes]:
    """Returns the files of a tokenizer folder that `load_tokenizer` and transformers read."""
    return self._files.contents()

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


def load_tokenizer(
  config: TokenizerConfig,
  *,
  checkpoint_dir: str | os.PathLike[str] | None = None,
  source_dir: str | os.PathLike[str] | None = None,
  family: str | None = None,
  embedding_size: int | None = None,
) -> Tokenizer:
  """Loads the tokenizer of a run.

  Args:
    config: Which one, after gin had its say (`gin_settings.apply`).
    checkpoint_dir: The tokenizer folder that travels with the checkpoint, if there is one.
    source_dir: The folder of the checkpoint's config.json and generation_config.json. Another
      tokenizer than the checkpoint's brings its own, or none.
    family: The checkpoint's family, to which its tokenizer belongs.
    embedding_size: V, rows of the embedding that the ids index; None leaves it unchecked.

  Raises:
    FileNotFoundError: if there is no tokenizer where it should be.
    ValueError: if a named tokenizer is not the checkpoint's, or has more ids than the embedding.
  """
  named = config.type in TOKENIZER_NAMES
  path = config.other_path
  config_dir = None if source_dir is None else epath.Path(source_dir)
  if path is None:
    if checkpoint_dir is None or not epath.Path(checkpoint_dir).exists():
      wanted = f"tokenizer {config.type!r}" if named else "a tokenizer"
      raise FileNotFoundError(
        f"{wanted} is needed and no checkpoint brings one: give `tokenizer.path` (a "
        "SentencePiece file or Hugging Face tokenizer folder)"
      )
    if named and family is not None and family != config.type:
      raise ValueError(
        f"tokenizer {config.type!r} was asked for, but the checkpoint brings {family!r}'s: give "
        "`tokenizer.path` for another one"
      )
    path = checkpoint_dir
  else:
    config_dir = _own_configs(epath.Path(path))
  files = read_tokenizer_files(epath.Path(path), config_dir=config_dir)
  tokenizer = Tokenizer(files.with_tokens(config.extra_tokens), eos_ids(config_dir))
  if embedding_size is not None and tokenizer.vocab_size > embedding_size:
    extra = f" ({len(config.extra_tokens)} of them extra tokens)" if config.extra_tokens else ""
    raise ValueError(
      f"the tokenizer's vocabulary is larger than the embedding: {tokenizer.vocab_size} ids"
      f"{extra}, {embedding_size} rows"
    )
  return tokenizer


def _own_configs(path: epath.Path) -> epath.Path | None:
  """Returns the folder of the config files that belong to a tokenizer named by its path."""
  if not path.is_dir():
    return path.parent if path.name == ENCODER else None
  return path / "hf" if (path / "hf").is_dir() else path


def find_fault(
  folder: epath.Path, embedding_size: int, *, source_dir: epath.Path | None = None
) -> str | None:
  """Says why the tokenizer that travels with a checkpoint cannot serve it; None if it can.

  Args:
    folder: Its files.
    embedding_size: V, rows of the embedding.
    source_dir: The folder of the checkpoint's config files.
  """
  try:
    load_tokenizer(
      TokenizerConfig(),
      checkpoint_dir=folder,
      source_dir=source_dir,
      embedding_size=embedding_size,
    )
  except (ValueError, OSError, NotImplementedError) as error:
    return str(error)
  return None


def _ids_before_text(encoder: tokenizers.Tokenizer) -> list[int]:
  """Returns the ids that the post-processor puts before a text."""
  ids, text = (encoder.encode("x", add_special_tokens=special).ids for special in (True, False))
  starts = range(len(ids) - len(text) + 1)
  return ids[: next((i for i in starts if ids[i : i + len(text)] == text), 0)]


def _token_of(token_id: int, added: dict[str, int], vocabulary: Any) -> str:
  """Returns the text of a token given by its id; "" if there is none."""
  items = (
    vocabulary.items()
    if isinstance(vocabulary, dict)
    else ((piece, i) for i, (piece, *_) in enumerate(vocabulary))
  )
  return next((text for text, i in (*added.items(), *items) if i == token_id), "")


def _owned_by(
  spans: Sequence[tuple[int, int]], encoding: tokenizers.Encoding
) -> Int32[np.ndarray, "n"]:
  """Returns 1 for each token that shares a character with a span, else 0."""
  owned = np.zeros(len(encoding), np.int32)
  for start, end in spans:
    # Characters that normalisation removes have no token.
    held = (encoding.char_to_token(i) for i in range(start, end))
    first = next((token for token in held if token is not None), None)
    if first is None:
      continue
    held = (encoding.char_to_token(i) for i in range(end - 1, start - 1, -1))
    last = next(token for token in held if token is not None)
    # Of a character that is cut into bytes, that was the first token.
    while last + 1 < len(owned) and encoding.token_to_chars(last + 1)[0] < end:
      last += 1
    owned[first : last + 1] = 1
  return owned
