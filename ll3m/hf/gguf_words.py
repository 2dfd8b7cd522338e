"""How text is split into words before byte-level BPE, by the names that GGUF files give to it.

The regular expressions are those of the models' own tokenizer.json files, which llama.cpp
approximates.
"""

from typing import NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Words in which upper case precedes lower case.
_CASED = (
  rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+",
  rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*",
)
_ANY_CASE = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"


def _pattern(words: str, digits: str, after_symbols: str = r"[\r\n]*") -> str:
  return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{after_symbols}|\s*[\r\n]+|\s+(?!\S)|\s+"


class Words(NamedTuple):
  """How text is split, with llama.cpp's settings for that splitting.

  Attributes:
    pattern: Regular expression of the words; None for GPT-2's.
    single_digits: Whether each digit is a word of its own, before GPT-2's splitting.
    ignore_merges: Whether a word that is a token becomes that token regardless of the merges.
    add_bos: Whether BOS is added if the file does not say so explicitly.
    is_composed: Whether text is first brought to Unicode's normal form NFC.
  """

  pattern: str | None = None
  single_digits: bool = False
  ignore_merges: bool = False
  add_bos: bool = False
  is_composed: bool = False

  def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
    """Returns the splitter, which also converts the words to bytes."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if self.single_digits:
      steps.append(pre_tokenizers.Digits(individual_digits=True))
    if self.pattern:
      steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.pattern))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]

  def normalizer(self) -> normalizers.Normalizer | None:
    """Returns the normaliser, if there is one."""
    return normalizers.NFC() if self.is_composed else None


_CL100K = _pattern(_ANY_CASE, r"\p{N}{1,3}")

# By llama.cpp's name for them, the value of `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
  **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), Words()),
  **dict.fromkeys(
    ("smollm", "starcoder", "refact", "command-r", "codeshell"), Words(single_digits=True)
  ),
  # Llama 3
  **dict.fromkeys(
    ("llama-bpe", "llama3", "llama-v3"), Words(_CL100K, ignore_merges=True, add_bos=True)
  ),
  # OLMo 2, Phi-4 and SmolLM3
  **dict.fromkeys(("dbrx", "smaug-bpe"), Words(_CL100K)),
  "qwen2": Words(_pattern(_ANY_CASE, r"\p{N}"), is_composed=True),
  # Phi-4-mini
  "gpt-4o": Words(
    _pattern("|".join(f"{word}{_CONTRACTIONS}?" for word in _CASED), r"\p{N}{1,3}", r"[\r\n/]*")
  ),
  # Mistral Nemo
  "tekken": Words(
    _pattern("|".join(_CASED), r"\p{N}", r"[\r\n/]*"), ignore_merges=True, add_bos=True
  ),
}
