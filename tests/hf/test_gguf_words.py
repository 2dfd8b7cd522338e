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

from ll3m.hf.gguf_tokenizer import tokenizer_files
from tests.hf.test_gguf_tokenizer import HARD, NORMAL, TEXTS

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


@pytest.mark.parametrize("pre", PATTERNS)
def test_ids_are_those_of_tiktoken(nemo, pre):
  _, ranks, pieces, merges = nemo
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": pieces,
    "tokenizer.ggml.token_type": [NORMAL] * len(pieces),
    "tokenizer.ggml.merges": merges,
  }
  files = tokenizer_files(metadata.get, Path("model.gguf"))
  encoder = Tokenizer.from_str(files["tokenizer.json"]().decode())
  oracle = tiktoken.Encoding(
    "oracle", pat_str=PATTERNS[pre], mergeable_ranks=ranks, special_tokens={}
  )
  random = np.random.default_rng(0)
  texts = ["".join(random.choice(PARTS, n)) for n in random.integers(2, 20, 500)]
  for text in (*TEXTS, *HARD, *texts):
    given = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert encoder.encode(text).ids == oracle.encode(given), repr(text)
    assert encoder.decode(encoder.encode(text).ids) == given
