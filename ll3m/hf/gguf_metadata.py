"""The metadata of a GGUF file: plain values by key. Unknown keys raise errors.

Keys of the model (`llama.`) and of its tokenizer (`tokenizer.`) may change what the model computes.
A key that is not read must therefore be known to be irrelevant, or must have a value that changes
nothing. The tables follow llama.cpp, which defines the format. Keys with other prefixes
(`general.`, `quantize.`, those of the programs that wrote the file) describe the file; the reader
checks the few that matter.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from ll3m.core.model_config import did_you_mean

# Keys that are read.
_USED = frozenset(
  [
    *(
      f"llama.{key}"
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
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",  # used by yarn only, which is not supported
    "llama.tensor_data_layout",
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
  "llama.vocab_size": lambda value, config: value == config["vocab_size"],
  "llama.rope.dimension_count": lambda value, config: value == config["head_dim"],
  "llama.rope.scaling.attn_factor": _only(0, 1),
  "llama.rope.scaling.alpha": _only(0, 1),
  "llama.attention.value_length": lambda value, config: value == config["head_dim"],
  "llama.attention.causal": _only(True),
  "llama.attention.sliding_window": _only(0),
  "llama.attention.scale": lambda value, config: value == 0 or _is_score_scale(value, config),
  "llama.attention.clamp_kqv": _only(0),
  "llama.attention.max_alibi_bias": _only(0),
  "llama.attn_logit_softcapping": _only(0),
  "llama.final_logit_softcapping": _only(0),
  "llama.logit_scale": _only(0, 1),
  "llama.residual_scale": _only(0, 1),
  "llama.embedding_scale": _only(0, 1),
  "llama.use_parallel_residual": _only(False),
  "llama.pooling_type": _only(0),
  "llama.expert_count": _only(0),
  "llama.expert_used_count": _only(0),
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

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the value of a key, or the default if the file lacks it."""
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
    if key not in self._fields:
      raise ValueError(f"{self.path} lacks the metadata key {key}")
    return self.get(key)

  def check(self, config: Mapping[str, Any]) -> None:
    """Checks that keys which are not read cannot change what model or tokenizer compute.

    Args:
      config: The model's config.json, built from the metadata.

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
    known = {*_USED, *_IRRELEVANT, *neutral}
    known |= {f"tokenizer.chat_template.{n}" for n in self.get("tokenizer.chat_templates", ())}
    different, unknown = [], []
    for key in self._fields:
      if not key.startswith(("llama.", "tokenizer.")):
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


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
