"""The metadata of a GGUF file: plain values by key. Unknown keys raise errors.

Keys of the model (`{arch}.`, where {arch} is the architecture) and of its tokenizer (`tokenizer.`)
may change what the model computes. A key that is not read must therefore be known to be irrelevant,
or must have a value that changes nothing. The tables follow llama.cpp, which defines the format.
Keys with other prefixes (`general.`, `quantize.`, those of the programs that wrote the file)
describe the file; the reader checks the few that matter.
"""

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from ll3m.core.model_config import did_you_mean

_ARCHITECTURE = "{arch}"

# Keys that are read.
_USED = frozenset(
  [
    *(
      f"{_ARCHITECTURE}.{key}"
      for key in (
        "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.type",
        "rope.scaling.factor", "rope.scale_linear",
      )
    ),
    *(
      f"tokenizer.ggml.{key}"
      for key in (
        "model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id",
        "eos_token_ids", "eot_token_id", "eom_token_id", "unknown_token_id", "padding_token_id",
        "add_bos_token", "add_eos_token",
      )
    ),
    "tokenizer.chat_template",
    "tokenizer.chat_templates",
  ]
)  # fmt: skip

# Tokens for infilling, classification and masking, which the tokenizer never adds to a text, and
# notes of the programs that write GGUF files.
_IRRELEVANT = frozenset(
  [
    *(
      f"tokenizer.ggml.{key}_token_id"
      for key in (
        "seperator", "separator", "cls", "mask", "prefix", "suffix", "middle", "eot_suffix",
        "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep",
      )
    ),
    "tokenizer.huggingface.json",
    "{arch}.rope.scaling.finetuned",
    "{arch}.rope.scaling.original_context_length",  # used by longrope and yarn only
    "{arch}.tensor_data_layout",
  ]
)  # fmt: skip


def _only(*values: Any) -> Callable[[Any, Mapping[str, Any]], bool]:
  return lambda value, config: value in values


def _is_score_scale(value: Any, config: Mapping[str, Any]) -> bool:
  usual = config["head_dim"] ** -0.5
  return isinstance(value, float) and math.isclose(value, usual, rel_tol=1e-6)  # float32 in GGUF


# Keys with values that change nothing. Each function maps (value, the model's config.json) to
# whether the value is one of them.
_NEUTRAL: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
  "{arch}.vocab_size": lambda value, config: value == config["vocab_size"],
  "{arch}.rope.dimension_count": lambda value, config: (
    value == config["head_dim"] * config.get("partial_rotary_factor", 1)
  ),
  "{arch}.rope.freq_base_swa": lambda value, config: (
    shortest_decimal(value) == config["rope_theta"]
  ),
  "{arch}.rope.scaling.attn_factor": lambda value, config: (
    value in (0, 1) or config.get("rope_scaling", {}).get("rope_type") == "longrope"
  ),
  "{arch}.rope.scaling.alpha": _only(0, 1),
  "{arch}.attention.value_length": lambda value, config: value == config["head_dim"],
  "{arch}.attention.causal": _only(True),
  "{arch}.attention.sliding_window": _only(0),
  "{arch}.attention.scale": lambda value, config: value == 0 or _is_score_scale(value, config),
  "{arch}.attention.clamp_kqv": _only(0),
  "{arch}.attention.max_alibi_bias": _only(0),
  "{arch}.attn_logit_softcapping": _only(0),
  "{arch}.final_logit_softcapping": _only(0),
  "{arch}.logit_scale": _only(0, 1),
  "{arch}.residual_scale": _only(0, 1),
  "{arch}.embedding_scale": _only(0, 1),
  "{arch}.use_parallel_residual": _only(False),
  "{arch}.pooling_type": _only(0),
  "{arch}.expert_count": _only(0),
  "{arch}.expert_used_count": _only(0),
  "tokenizer.ggml.add_sep_token": _only(False),
  "tokenizer.ggml.remove_extra_whitespaces": _only(False),
  "tokenizer.ggml.precompiled_charsmap": _only([]),
  "tokenizer.ggml.suppress_tokens": _only([]),
  "tokenizer.ggml.token_type_count": _only(0, 1),
}


class Metadata:
  """The key-value pairs of a file, as plain Python values."""

  def __init__(self, path: Path, reader: GGUFReader):
    """Wraps an open file.

    Args:
      path: The path of the file, for messages.
      reader: The reader of the file.
    """
    self.path = path
    self._fields = reader.fields
    self._values: dict[str, Any] = {}

  def full(self, key: str) -> str:
    """Returns a key with the architecture in place of {arch}."""
    return key.replace(_ARCHITECTURE, str(self.get("general.architecture")))

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the value of a key, or the default if the file lacks it.

    In all keys, {arch} means the file's architecture.
    """
    if _ARCHITECTURE in key:
      key = self.full(key)
    if key not in self._fields:
      return default
    if key not in self._values:  # decoding a vocabulary takes a second
      self._values[key] = self._fields[key].contents()
    return self._values[key]

  def require(self, key: str) -> Any:
    """Returns the value of a key.

    Raises:
      ValueError: The file lacks the key.
    """
    if (value := self.get(key)) is None:
      raise ValueError(f"{self.path} lacks the metadata key {self.full(key)}")
    return value

  def check(self, config: Mapping[str, Any], used: Collection[str]) -> None:
    """Checks that keys which are not read cannot change what model or tokenizer compute.

    Args:
      config: The model's config.json, built from the metadata.
      used: The keys that only this architecture has, and which were read.

    Raises:
      NotImplementedError: Keys are unknown, or have a value that is not supported. The message
        lists them all.
    """
    neutral = _NEUTRAL | {
      # Read for SentencePiece models only; byte-level BPE has no such prefix.
      "tokenizer.ggml.add_space_prefix": lambda value, config: (
        not value or self.get("tokenizer.ggml.model") == "llama"
      )
    }
    neutral = {self.full(key): accepts for key, accepts in neutral.items() if key not in used}
    known = {*map(self.full, (*_USED, *_IRRELEVANT, *used)), *neutral}
    known |= {f"tokenizer.chat_template.{n}" for n in self.get("tokenizer.chat_templates", ())}
    different, unknown = [], []
    for key in self._fields:
      if not key.startswith((self.full("{arch}."), "tokenizer.")):
        continue
      if key not in known:
        unknown.append(f"{key}={_shown(self.get(key))}{did_you_mean(key, known)}")
      elif key in neutral and not neutral[key](self.get(key), config):
        different.append(f"{key}={_shown(self.get(key))}")
    if different:
      raise NotImplementedError(f"{self.path} has {', '.join(different)}, which is not supported")
    if unknown:
      raise NotImplementedError(
        f"{self.path} has {', '.join(unknown)}, unknown to LL3M, which may change what the model "
        f"computes; if not, remove it (gguf's gguf_new_metadata.py --remove-metadata)"
      )


def shortest_decimal(value: float | np.floating) -> float:
  """Returns the shortest decimal that rounds to a float32: 1e-05, not 9.999999747e-06."""
  return float(str(np.float32(value)))


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
