"""Rebuilds a Hugging Face tokenizer from the metadata of a GGUF file."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  processors,
)

from ll3m.core.model_config import did_you_mean
from ll3m.data.spm_conversion import find_overlap, merges_from_scores
from ll3m.hf.gguf_words import PRE_TOKENIZERS

Get = Callable[..., Any]

# GGUF's numbers for the kinds of pieces.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_KINDS = range(1, 7)  # unknown is 2, a byte 6
# The score that llama.cpp's converter assigns to tokens added to a SentencePiece model.
_ADDED = -1000.0

# Phi-3's added tokens take the white space after them, except these; no key says so.
_NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")

# Names of special tokens in transformers and in GGUF.
_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))


def token_ids(get: Get) -> dict[str, int]:
  """Returns the ids of BOS, EOS and padding by their keys in config.json.

  Args:
    get: Function from a key to its metadata value; None if the file lacks the key.
  """
  ids = {f"{name}_token_id": get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL}
  return {key: i for key, i in ids.items() if i is not None and key != "unk_token_id"}


def generation_config(get: Get) -> dict[str, Any]:
  """Returns a generation_config.json whose EOS tokens are all tokens that end an answer.

  Args:
    get: Function from a key to its metadata value; None if the file lacks the key.
  """
  config: dict[str, Any] = token_ids(get)
  ends = [get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
  ends += get("tokenizer.ggml.eos_token_ids") or []
  ends = list(dict.fromkeys(i for i in ends if i is not None))
  if ends:
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
  return config


def tokenizer_files(get: Get, path: Path) -> dict[str, Callable[[], bytes]]:
  """Prepares the files of a tokenizer folder that `transformers.AutoTokenizer` loads.

  Args:
    get: Function from a key to its metadata value; None if the file lacks the key.
    path: The GGUF file, for messages.

  Returns:
    Functions that return the files' contents, by file name; empty if the file has no tokenizer.

  Raises:
    NotImplementedError: The kind of tokenizer is unknown, or tokenizer.json cannot express the
      tokenizer exactly.
    ValueError: The parts of the tokenizer contradict each other.
  """
  kind = get("tokenizer.ggml.model")
  if kind in (None, "no_vocab"):
    return {}
  if kind not in ("gpt2", "llama"):
    raise NotImplementedError(f"{path} has a tokenizer of kind {kind!r}, expected gpt2 or llama")
  pre = get("tokenizer.ggml.pre", "default")
  if kind == "gpt2" and pre not in PRE_TOKENIZERS:
    raise NotImplementedError(
      f"{path} has tokenizer.ggml.pre={pre!r}{did_you_mean(str(pre), PRE_TOKENIZERS)}, expected "
      f"one of {', '.join(PRE_TOKENIZERS)}"
    )
  pieces, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
  partner = get("tokenizer.ggml.merges" if kind == "gpt2" else "tokenizer.ggml.scores")
  if not pieces or not kinds or partner is None or len(pieces) != len(kinds):
    raise ValueError(f"{path} lacks parts of its tokenizer (tokens, token_type, merges or scores)")
  if strange := sorted(set(kinds) - set(_KINDS)):
    raise ValueError(
      f"{path} has {strange} in tokenizer.ggml.token_type, expected 1 to {_KINDS[-1]}"
    )
  for key in ("bos", "eos", "unknown", "padding", "eot", "eom"):
    if (i := get(f"tokenizer.ggml.{key}_token_id")) is not None and i >= len(pieces):
      raise ValueError(
        f"{path} has tokenizer.ggml.{key}_token_id={i}, but only {len(pieces)} tokens"
      )
  try:
    built = (_byte_level if kind == "gpt2" else _sentencepiece)(get)
  except NotImplementedError as error:
    raise NotImplementedError(f"the tokenizer of {path} {error}") from error
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"the tokenizer of {path} cannot be built: {error}") from error
  return {
    "tokenizer.json": lambda: built.to_str(pretty=True).encode(),
    "tokenizer_config.json": lambda: _json(_tokenizer_config(get)),
    "special_tokens_map.json": lambda: _json(_special_tokens(get)),
  }


def _byte_level(get: Get) -> Tokenizer:
  """Builds a byte-level BPE tokenizer, as in GPT-2 (`tokenizer.ggml.model` = gpt2)."""
  vocab = {piece: i for i, piece in enumerate(get("tokenizer.ggml.tokens"))}
  merges = [_merge(text, vocab) for text in get("tokenizer.ggml.merges")]
  words = PRE_TOKENIZERS[get("tokenizer.ggml.pre", "default")]
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words.ignore_merges))
  tokenizer.pre_tokenizer = words.pre_tokenizer()
  if (normalizer := words.normalizer()) is not None:
    tokenizer.normalizer = normalizer
  tokenizer.decoder = decoders.ByteLevel()
  return _finish(tokenizer, get)


def _merge(text: str, vocab: Mapping[str, int]) -> tuple[str, str]:
  """Splits a merge at the space between its two pieces, which may themselves contain spaces."""
  for cut, character in enumerate(text):
    left, right = text[:cut], text[cut + 1 :]
    if character == " " and left in vocab and right in vocab and left + right in vocab:
      return left, right
  raise ValueError(f"the merge {text!r} does not join two tokens into a third")


def _sentencepiece(get: Get) -> Tokenizer:
  """Builds a BPE tokenizer over characters with byte fallback, as in Llama 2's SentencePiece."""
  pieces, scores = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.scores")
  kinds = get("tokenizer.ggml.token_type")
  vocab = {piece: i for i, piece in enumerate(pieces)}
  unknown = pieces[get("tokenizer.ggml.unknown_token_id", 0)]
  normal = {p: s for p, s, k in zip(pieces, scores, kinds, strict=True) if k == _NORMAL}
  unused = {p: 0.0 for p, k in zip(pieces, kinds, strict=True) if k == _UNUSED}
  if made := merges_from_scores(unused, vocab):
    # SentencePiece merges pieces into them and splits them again at the end.
    raise NotImplementedError(
      f"has unused pieces that are merges of others, such as {''.join(made[0])!r}"
    )
  merges = merges_from_scores(normal, vocab)
  if (piece := find_overlap(merges, normal)) is not None:
    raise NotImplementedError(
      f"gives the same score to pieces that overlap, such as {piece!r}; which is merged first "
      f"depends on their positions in a text, which tokenizer.json cannot express"
    )
  tokenizer = Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=merges,
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  steps = [normalizers.Replace(" ", "▁")]
  undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if get("tokenizer.ggml.add_space_prefix", True):
    steps.insert(0, _prefix(_own_symbols(get)))
    undo.append(decoders.Strip(content=" ", left=1))
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.decoder = decoders.Sequence(undo)
  return _finish(tokenizer, get)


def _own_symbols(get: Get) -> set[str]:
  """Returns the symbols that a SentencePiece model itself defines, without tokens added later.

  SentencePiece finds its own symbols after adding its prefix: `a<sep>b` becomes `▁a <sep> b`.
  Tokens added later split the text first, and each part gets a prefix: `▁a <sep> ▁b`.
  """
  parts = (get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
  scores = get("tokenizer.ggml.scores") or ()
  found = zip(*parts, scores, strict=False)
  return {piece for piece, kind, score in found if kind == _USER_DEFINED and score != _ADDED}


def _prefix(symbols: Collection[str]) -> normalizers.Normalizer:
  """Returns a normaliser that puts ▁ before a text unless the text is a single symbol.

  The library searches the normalised text for the normalised form of each symbol, which must not
  have the prefix. A text that is a single symbol therefore lacks the ▁ that SentencePiece adds.
  """
  if not symbols:
    return normalizers.Prepend("▁")
  alone = "|".join(re.escape(symbol) for symbol in sorted(symbols))
  return normalizers.Replace(Regex(rf"\A(?!(?:{alone})?\z)"), "▁")


def _finish(tokenizer: Tokenizer, get: Get) -> Tokenizer:
  """Adds the special tokens and the template that puts BOS and EOS around a text."""
  pieces, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
  own = _own_symbols(get)
  is_phi3 = get("general.architecture") == "phi3" and get("tokenizer.ggml.model") == "llama"
  added = [
    AddedToken(
      piece,
      special=kind == _CONTROL,
      normalized=piece in own,
      rstrip=is_phi3 and piece not in _NOT_STRIPPED,
    )
    for piece, kind in zip(pieces, kinds, strict=True)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  tokenizer.add_tokens(added)
  around = {}
  for name in ("bos", "eos"):
    token = _special_tokens(get).get(f"{name}_token")
    if token and _adds(get, name):
      around[name] = (token, tokenizer.token_to_id(token))
  if around:
    template = " ".join(
      ([around["bos"][0]] if "bos" in around else [])
      + ["$A"]
      + ([around["eos"][0]] if "eos" in around else [])
    )
    tokenizer.post_processor = processors.TemplateProcessing(
      single=template,
      pair=f"{template} {template.replace('$A', '$B')}",
      special_tokens=list(around.values()),
    )
  return tokenizer


def _adds(get: Get, name: str) -> bool:
  """Returns whether BOS or EOS (`name`) is added to a text; the defaults are llama.cpp's."""
  is_default = name == "bos" and (
    get("tokenizer.ggml.model") == "llama" or PRE_TOKENIZERS[get("tokenizer.ggml.pre")].add_bos
  )
  return get(f"tokenizer.ggml.add_{name}_token", is_default)


def _special_tokens(get: Get) -> dict[str, str]:
  pieces = get("tokenizer.ggml.tokens")
  ids = {name: get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL}
  return {f"{name}_token": pieces[i] for name, i in ids.items() if i is not None}


def _tokenizer_config(get: Get) -> dict[str, Any]:
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": _adds(get, "bos"),
    "add_eos_token": _adds(get, "eos"),
    "clean_up_tokenization_spaces": False,
    "model_max_length": get("{arch}.context_length"),
  } | _special_tokens(get)
  named = {n: get(f"tokenizer.chat_template.{n}") for n in get("tokenizer.chat_templates") or ()}
  template = get("tokenizer.chat_template")
  if any(named.values()):
    templates = ({"default": template} | named).items()
    config["chat_template"] = [{"name": n, "template": t} for n, t in templates if t]
  elif template:
    config["chat_template"] = template
  return config


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
