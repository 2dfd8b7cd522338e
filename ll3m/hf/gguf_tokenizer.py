"""Rebuilds a Hugging Face tokenizer from the metadata of a GGUF file."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

Get = Callable[..., Any]

# Kinds of piece, as GGUF numbers them.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


def _llama3_words() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


# How text is cut into words before BPE, by llama.cpp's `tokenizer.ggml.pre`.
_PRE_TOKENIZERS = {
  **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _gpt2_words),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _single_digits),
  **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _llama3_words),
}


def tokenizer_files(get: Get, path: Path) -> dict[str, Callable[[], bytes]]:
  """Prepares the files of a tokenizer folder that `transformers.AutoTokenizer` loads.

  Args:
    get: gives a metadata value by key, None where there is none.
    path: the GGUF file, for messages.

  Returns:
    Makers of the files' contents, by name; empty if the GGUF has no tokenizer.

  Raises:
    NotImplementedError: a kind of tokenizer that is not known.
    ValueError: its parts do not fit together.
  """
  kind = get("tokenizer.ggml.model")
  if kind in (None, "no_vocab"):
    return {}
  if kind not in ("gpt2", "llama"):
    raise NotImplementedError(f"{path} has a tokenizer of kind {kind!r}, expected gpt2 or llama")
  pre = get("tokenizer.ggml.pre", "default")
  if kind == "gpt2" and pre not in _PRE_TOKENIZERS:
    raise NotImplementedError(
      f"{path} cuts words as {pre!r}, expected one of {', '.join(_PRE_TOKENIZERS)}"
    )
  pieces, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
  partner = get("tokenizer.ggml.merges" if kind == "gpt2" else "tokenizer.ggml.scores")
  if not pieces or not kinds or partner is None or len(pieces) != len(kinds):
    raise ValueError(f"{path} lacks parts of its tokenizer (tokens, token_type, merges or scores)")
  build = functools.partial(_byte_level if kind == "gpt2" else _sentencepiece, get)
  files = {
    "tokenizer.json": lambda: build().to_str(pretty=True).encode(),
    "tokenizer_config.json": lambda: _json(_tokenizer_config(get, kind)),
    "special_tokens_map.json": lambda: _json(_special_tokens(get)),
  }
  return files


def _byte_level(get: Get) -> Tokenizer:
  """BPE over bytes, as GPT-2 does it (`tokenizer.ggml.model` = gpt2)."""
  vocab = {piece: i for i, piece in enumerate(get("tokenizer.ggml.tokens"))}
  merges = [tuple(merge.split(" ")) for merge in get("tokenizer.ggml.merges")]
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = _PRE_TOKENIZERS[get("tokenizer.ggml.pre", "default")]()
  tokenizer.decoder = decoders.ByteLevel()
  return _finish(tokenizer, get)


def _sentencepiece(get: Get) -> Tokenizer:
  """BPE over characters with byte fallback, as Llama 2's SentencePiece model does it."""
  pieces, scores = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.scores")
  kinds = get("tokenizer.ggml.token_type")
  vocab = {piece: i for i, piece in enumerate(pieces)}
  unknown = pieces[get("tokenizer.ggml.unknown_token_id", 0)]
  normal = {p: s for p, s, k in zip(pieces, scores, kinds, strict=True) if k == _NORMAL}
  tokenizer = Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=_merges_from_scores(normal, vocab),
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefix = get("tokenizer.ggml.add_space_prefix", True)
  steps = [normalizers.Replace(" ", "▁")]
  undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if prefix:
    steps.insert(0, normalizers.Prepend("▁"))
    undo.append(decoders.Strip(content=" ", left=1))
  tokenizer.normalizer = normalizers.Sequence(steps)
  tokenizer.decoder = decoders.Sequence(undo)
  return _finish(tokenizer, get)


def _merges_from_scores(pieces: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
  """Lists the merges that give each piece: SentencePiece merges the best-scored piece first."""
  merges = []
  for piece, score in pieces.items():
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in vocab and right in vocab:
        merges.append((-score, vocab[left], vocab[right], left, right))
  return [(left, right) for *_, left, right in sorted(merges)]


def _finish(tokenizer: Tokenizer, get: Get) -> Tokenizer:
  """Adds the special tokens, and the template that puts BOS and EOS around a text."""
  pieces, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
  added = [
    AddedToken(piece, special=kind == _CONTROL, normalized=False)
    for piece, kind in zip(pieces, kinds, strict=True)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  tokenizer.add_tokens(added)
  around = {}
  for name, default in (("bos", get("tokenizer.ggml.model") == "llama"), ("eos", False)):
    token = _special_tokens(get).get(f"{name}_token")
    if token and get(f"tokenizer.ggml.add_{name}_token", default):
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


def _special_tokens(get: Get) -> dict[str, str]:
  pieces = get("tokenizer.ggml.tokens")
  keys = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
  ids = {name: get(f"tokenizer.ggml.{key}_token_id") for name, key in keys}
  return {f"{name}_token": pieces[i] for name, i in ids.items() if i is not None}


def _tokenizer_config(get: Get, kind: str) -> dict[str, Any]:
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": get("tokenizer.ggml.add_bos_token", kind == "llama"),
    "add_eos_token": get("tokenizer.ggml.add_eos_token", False),
    "clean_up_tokenization_spaces": False,
    "model_max_length": get("llama.context_length"),
  } | _special_tokens(get)
  if template := get("tokenizer.chat_template"):
    config["chat_template"] = template
  return config


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
