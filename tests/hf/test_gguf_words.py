"""Splitting into words: the oracle is tiktoken, with Mistral Nemo's real vocabulary.

The regular expressions here are those of OpenAI's `tiktoken`, of Qwen's `tokenization_qwen.py`, and
of Mistral's own file, except that Llama 3's is that of its `tokenizer.py`.
"""

import base64
import importlib.util
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer

from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
from ll3m.hf.gguf_tokenizer import tokenizer_files
from tests.hf.test_gguf_tokenizer import CONTROL, HARD, NORMAL, TEXTS

TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + TAIL
PATTERNS = {
  "llama-bpe": LLAMA3,
  "dbrx": LLAMA3,
  "smaug-bpe": LLAMA3,
  "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
  "gpt-4o": (
    rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
  ),
  "tekken": rf"{CASED[0]}|{CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}",
}
PARTS = (
  " ", "  ", "\n", "\r\n", "\t", "'s", "'RE", "'ll", "a", "Hello", "camelCase", "HTTPServer", "é",
  "e\u0301", "漢字", "Ǆ", "ʼn", "12345", "½", "/", "://", "...", "!?", "=>", "🙂", "\u00a0", "नमस्ते",
)  # fmt: skip


def byte_names():
  """Returns the characters that stand for the 256 bytes, as in GPT-2's `encoder.py`."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in shown]
  return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@pytest.fixture(scope="module")
def nemo():
  """The pattern of Nemo's file, its ranks, and the pieces and merges of a GGUF file."""
  (package,) = importlib.util.find_spec("mistral_common").submodule_search_locations
  file = json.loads((Path(package) / "data" / "tekken_240718.json").read_text())
  ranks = {
    base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in file["vocab"][:40_000]
  }
  names = byte_names()

  def spelt(token):
    return "".join(names[byte] for byte in token)

  # The library merges pairs, tiktoken the pair whose result has the lowest rank.
  merges = [
    f"{spelt(token[:cut])} {spelt(token[cut:])}"
    for token in ranks
    for cut in range(1, len(token))
    if token[:cut] in ranks and token[cut:] in ranks
  ]
  pieces = [spelt(token) for token in ranks]
  return file["config"]["pattern"], ranks, pieces, merges


def test_the_pattern_of_nemo_is_that_of_its_file(nemo):
  assert nemo[0] == PATTERNS["tekken"]


def metadata(nemo, pre):
  """Returns the metadata of a GGUF file with Nemo's vocabulary."""
  _, _, pieces, merges = nemo
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": [*pieces, "<|eos|>"],
    "tokenizer.ggml.token_type": [NORMAL] * len(pieces) + [CONTROL],
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.eos_token_id": len(pieces),
    "tokenizer.ggml.add_bos_token": False,
  }


def texts_and_ids(nemo, pre, count):
  """Returns texts and their ids according to tiktoken."""
  oracle = tiktoken.Encoding(
    "oracle", pat_str=PATTERNS[pre], mergeable_ranks=nemo[1], special_tokens={}
  )
  random = np.random.default_rng(0)
  texts = ["".join(random.choice(PARTS, n)) for n in random.integers(2, 20, count)]
  for text in (*TEXTS, *HARD, *texts):
    # Qwen's tokenizer normalises the text first.
    yield text, oracle.encode(unicodedata.normalize("NFC", text) if pre == "qwen2" else text)


@pytest.mark.parametrize("pre", PATTERNS)
def test_ids_are_those_of_tiktoken(nemo, pre):
  files = tokenizer_files(metadata(nemo, pre).get, Path("model.gguf"))
  encoder = Tokenizer.from_str(files["tokenizer.json"]().decode())
  for text, ids in texts_and_ids(nemo, pre, 500):
    assert encoder.encode(text).ids == ids, repr(text)
  assert encoder.decode(encoder.encode(TEXTS[1]).ids) == TEXTS[1]


@pytest.mark.parametrize(
  ("pre", "tokenizer_class", "model_type"),
  [
    ("llama-bpe", "PreTrainedTokenizerFast", "llama"),
    ("tekken", "PreTrainedTokenizerFast", "mistral"),
    ("qwen2", "Qwen2Tokenizer", "qwen2"),
    ("qwen2", "Qwen2Tokenizer", "qwen3"),
    ("dbrx", "GPT2Tokenizer", "olmo2"),
    ("dbrx", "GPT2Tokenizer", "phi3"),
    ("gpt-4o", "GPT2Tokenizer", "phi3"),
  ],
)
def test_published_folders_keep_their_words(nemo, tmp_path, pre, tokenizer_class, model_type):
  """The published class is not always that of the encoder: OLMo 2 and Phi-4 name GPT-2's."""
  content = tokenizer_files(metadata(nemo, pre).get, Path("model.gguf"))["tokenizer.json"]()
  (tmp_path / "tokenizer.json").write_bytes(content)
  settings = {"tokenizer_class": tokenizer_class, "eos_token": "<|eos|>", "add_prefix_space": False}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
  ours = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
  for text, ids in texts_and_ids(nemo, pre, 100):
    assert list(ours.encode(text)) == ids, repr(text)
