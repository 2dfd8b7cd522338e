"""Tokenizers: text to token ids and back.

This module does not import TensorFlow, and imports transformers only for folders that need it
(`tokenizer_files.py`), so that commands which only encode and decode text start quickly.
`seqio_vocabulary.py` wraps tokenizers for seqio.

User text never yields control tokens: "</s>" in a document is ordinary characters. The encoder
has private names for control tokens (`sealed_encoder.py`). If a chat template writes a control
token, its text is replaced by the private name, so that a text is always tokenised as a whole.
"""

import bisect
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np
from etils import epath
from jaxtyping import Int32

from ll3m.data import chat_template
from ll3m.data.config import TOKENIZER_NAMES, TokenizerConfig
from ll3m.data.encodings import ids_before_text, owned_by, token_of
from ll3m.data.generation_config import eos_ids
from ll3m.data.sealed_encoder import SEAL, build_sealed
from ll3m.data.tokenizer_files import (
  ENCODER,
  TokenizerFiles,
  read_tokenizer_files,
)

# Inserted after the first character of a control string in user text (`Tokenizer.quote`).
_QUOTE = SEAL[::-1] + "\ufdef"


class Tokenizer:
  """Two-way mapping between text and token ids.

  Attributes:
    prefix: Token ids at the beginning of every document: [BOS] or [].
    bos_id: First id of `prefix`, or None.
    eos_id: Id of the token that ends a document.
    stop_ids: Ids of the tokens that end a generated text: `eos_id`, those named by the checkpoint's
      generation_config.json (else config.json), and those that end an assistant's turn.
    vocab_size: Largest token id plus 1.
    fingerprint: Hash that changes whenever the ids of some text or conversation may change.
    special_tokens: Texts of special tokens, by the names that chat templates use ("bos_token",
      ...).
    control_tokens: Texts of the tokens that user text never yields, longest first: special tokens,
      and those with which the chat template begins and ends turns.
    turn_ends: Those of them that chat templates write right after an assistant's answer.
    chat_templates: Jinja sources by name.
    control_ids: Ids of `control_tokens`.
    byte_ids: Ids of tokens that stand for one byte each, whose text depends on adjacent bytes.
    unknown_id: Id of the token that stands for characters that the vocabulary does not have, or -1.
    silent_ids: Ids of tokens that `decode` omits: those flagged special.
  """

  def __init__(self, files: TokenizerFiles, end_ids: Sequence[int] = ()):
    """Builds the encoder.

    Args:
      files: Contents of the tokenizer's files.
      end_ids: Token ids that end a text according to the model's config files.

    Raises:
      ValueError: A file is damaged, or no file names the token that ends a text.
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
      self.special_tokens["eos_token"] = token_of(end_ids[0], ids, vocabulary)
    self._files, self._end_ids = (
      dataclasses.replace(files, special_tokens=self.special_tokens),
      end_ids,
    )
    turns = [
      chat_template.find_turn_tokens(template, self.special_tokens, added)
      for template in self.chat_templates.values()
    ]
    self.turn_ends = frozenset(token for turn in turns for token in turn.ends)
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
    # Only the post-processor determines the ids before a text, as in transformers 5.
    self.prefix: list[int] = ids_before_text(self._encoder)
    self.bos_id: int | None = self.prefix[0] if self.prefix else None
    self.stop_ids = frozenset({eos, *end_ids, *(ids[token] for token in self.turn_ends)})
    vocab = self._encoder.get_vocab(with_added_tokens=True)
    self.vocab_size: int = 1 + max(vocab.values())
    self.silent_ids = frozenset(
      i for i, token in self._encoder.get_added_tokens_decoder().items() if token.special
    )
    unknown = source["model"].get("unk_token")
    if unknown is None and isinstance(source["model"].get("unk_id"), int):
      unknown = vocabulary[source["model"]["unk_id"]][0]  # a Unigram vocabulary is a list
    self.unknown_id: int = -1 if unknown is None else self._id_or_minus_one(unknown)
    has_bytes = "ByteFallback" in json.dumps(source.get("decoder"))
    self.byte_ids = frozenset(
      i for piece, i in vocab.items() if has_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
    )
    self.fingerprint = hashlib.sha256(
      repr(
        (files.encoder, self.bos_id, self.eos_id, self.special_tokens, self.chat_templates)
      ).encode()
    ).hexdigest()[:16]

  def __reduce__(self) -> tuple[type, tuple[TokenizerFiles, Sequence[int]]]:
    """Rebuilds the tokenizer in another process, whose private names differ."""
    return Tokenizer, (self._files, self._end_ids)

  def _check_ids(self, ids: dict[str, int]) -> None:
    """Checks that the library gives added tokens the ids in the file.

    The library numbers added tokens that are not in the vocabulary consecutively, whatever their
    ids in the file. With a wrong id, a model would read another token's embedding.

    Raises:
      ValueError: The library gives a token another id.
    """
    for content, said in ids.items():
      if (found := self.token_id(content)) != said:
        raise ValueError(
          f"{self._files.name}/{ENCODER} gives the added token {content!r} the id {said}, but the "
          f"tokenizers library numbers it {found}: the ids of added tokens must be consecutive"
        )

  @property
  def chat_template(self) -> str | None:
    """Template of conversations without tools, or None."""
    return self.chat_templates.get("default")

  def __call__(self, text: str) -> list[int]:
    """Returns the ids of a prompt: `prefix` and the ids of the text."""
    return [*self.prefix, *self.encode(text)]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without BOS and EOS; control tokens in it are plain text."""
    # The batched call, unlike encode(), lets other Python threads run at the same time.
    return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

  def encode_batch(
    self, texts: Sequence[tuple[str, Sequence[tuple[int, int]] | None]]
  ) -> list[tuple[list[int], Int32[np.ndarray, "n"]]]:
    """Tokenises whole texts, in parallel, and finds the tokens of their spans.

    A token belongs to a span if it holds any of its characters, as in the assistant mask of
    transformers. In "ASSISTANT: Yes", the token " Yes" belongs to the span of "Yes".

    Args:
      texts: Texts, in which control tokens are plain text, each with the start and end of its
        spans, in characters, in order; None stands for the whole text.

    Returns:
      The token ids of each text, and for each token 1 if it belongs to a span, else 0.
    """
    plain = [text for text, _ in texts]
    if all(spans is None for _, spans in texts):  # faster without the characters' places
      encoded = self._encoder.encode_batch_fast(plain, add_special_tokens=False)
    else:
      encoded = self._encoder.encode_batch(plain, add_special_tokens=False)
    return [
      (
        found.ids,
        np.ones(len(found), np.int32) if spans is None else owned_by(spans, found),
      )
      for (_, spans), found in zip(texts, encoded, strict=True)
    ]

  def quote(self, text: str) -> str:
    """Marks the control strings in user text as plain text for `encode_rendered`."""
    return self._marks.sub(lambda match: match[0][:1] + _QUOTE + match[0][1:], text)

  def encode_rendered(self, text: str) -> list[int]:
    """Returns the ids of a chat template's output, whose control strings are control tokens.

    Args:
      text: The text; control strings that `quote` has marked are plain text.
    """
    return self.encode(self.seal(text)[0])

  def seal(
    self, text: str, spans: Sequence[tuple[int, int]] = ()
  ) -> tuple[str, list[tuple[int, int]]]:
    """Returns the output of a chat template, and its spans, in the form that the encoder reads.

    Control strings get their private names, except those that `quote` has marked.
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

    return "".join(pieces), [(moved(a), moved(b)) for a, b in spans]

  def decode(self, ids: Iterable[SupportsInt], *, keep_control: bool = False) -> str:
    """Returns the text of ids; special tokens are omitted unless `keep_control`."""
    text = self._encoder.decode([int(i) for i in ids], skip_special_tokens=not keep_control)
    return text.replace(SEAL, "")

  def token_id(self, token: str) -> int | None:
    """Returns the id of the token with this text, or None."""
    sealed = self._encoder.token_to_id(SEAL + token + SEAL)
    return self._encoder.token_to_id(token) if sealed is None else sealed

  def unknown_characters(self, text: str) -> set[str]:
    """Returns the characters of a text that the vocabulary does not have."""
    encoding = self._encoder.encode(text, add_special_tokens=False)
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    found = {c for i, (start, end) in pairs if i == self.unknown_id for c in text[start:end]}
    return {c for c in found if not c.isspace()}

  def _id_or_minus_one(self, token: str) -> int:
    found = self.token_id(token)
    return -1 if found is None else found

  def files(self) -> dict[str, bytes]:
    """Returns the files of a tokenizer folder that `load_tokenizer` and transformers read."""
    return self._files.contents()

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes a folder that contains this tokenizer and nothing else.

    Existing files are removed: those of another tokenizer could take precedence, or change how this
    one is read.
    """
    files, folder = self.files(), epath.Path(folder)
    if folder.exists():
      folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)  # TensorFlow may still report that it exists
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
    config: Tokenizer options, with gin settings applied (`gin_settings.apply`).
    checkpoint_dir: Tokenizer folder of the checkpoint, or None.
    source_dir: Folder of the checkpoint's config.json and generation_config.json. For a tokenizer
      other than the checkpoint's, these files are taken from its own folder, if it has them.
    family: Family of the checkpoint, to which its tokenizer belongs.
    embedding_size: V, the number of embedding rows; None skips the check of the vocabulary's size.

  Raises:
    FileNotFoundError: There is no tokenizer at the path or in the checkpoint.
    ValueError: A named tokenizer is not the checkpoint's, or has more ids than the embedding.
  """
  named = config.type in TOKENIZER_NAMES
  path = config.other_path
  config_dir = None if source_dir is None else epath.Path(source_dir)
  if path is None:
    if checkpoint_dir is None or not epath.Path(checkpoint_dir).exists():
      wanted = f"tokenizer {config.type!r}" if named else "a tokenizer"
      raise FileNotFoundError(
        f"{wanted} is needed, but no checkpoint provides one: set `tokenizer.path` (a "
        "SentencePiece file or Hugging Face tokenizer folder)"
      )
    if named and family is not None and family != config.type:
      raise ValueError(
        f"tokenizer {config.type!r} was requested, but the checkpoint has a tokenizer of "
        f"{family!r}: set `tokenizer.path` to use another one"
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
  """Returns the folder of the config files that belong to the tokenizer at a path, or None."""
  if not path.is_dir():
    return path.parent if path.name == ENCODER else None
  return path / "hf" if (path / "hf").is_dir() else path
