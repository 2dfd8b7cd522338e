"""Keys of config.json that families need not read: irrelevant ones, and ones with a fixed value.

Any other key is rejected, because it may change what the model computes. Both tables were compiled
from transformers 5.23 (`PreTrainedConfig`, `GenerationConfig`, and the families' classes) and from
published files.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ll3m.core.model_config import ModelConfig, did_you_mean
from ll3m.families.quantisation import CONFIG_KEYS as QUANTISATION_KEYS

# Keys that do not change what a loaded model computes.
_UNUSED_KEYS = """
_name_or_path name_or_path _commit_hash transformers_version transformers.js_config auto_map
torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss unsloth_fixed unsloth_version
is_llama_config tokenizer_class tokenizer_model_max_length tokenizer_padding_side model_max_length
max_sequence_length padding_side prefix language bos_token eos_token pad_token unk_token
_attn_implementation _attn_implementation_autoset _attn_implementation_internal
attn_implementation _experts_implementation _experts_implementation_internal
experts_implementation _flash_attn_2_enabled use_flash_attn use_flash_attention
gradient_checkpointing chunk_size_feed_forward pretraining_tp ep_size keys_to_ignore_at_inference
is_decoder tie_encoder_decoder
initializer_range initializer_factor neftune_noise_alpha
id2label label2id num_labels problem_type finetuning_task task_specific_params
return_dict use_return_dict output_attentions output_hidden_states tie_last_hidden_states
use_cache
"""
# Generation settings, which older files store in config.json.
_GENERATION_KEYS = """
_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
assistant_lookbehind bad_words_ids begin_suppress_tokens cache_config cache_implementation
compile_config constraints continuous_batching_config disable_compile diversity_penalty do_sample
dola_layers early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
eta_cutoff exponential_decay_length_penalty force_words_ids forced_decoder_ids guidance_scale
is_assistant length_penalty low_memory max_cache_len max_length max_matching_ngram_size
max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
num_return_sequences output_logits output_scores penalty_alpha prefill_chunk_size
prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens
target_lookbehind temperature token_healing top_h top_k top_p typical_p use_mtp
watermarking_config
"""
_IRRELEVANT = frozenset(_UNUSED_KEYS.split() + _GENERATION_KEYS.split())
# LL3M trains without dropout, and inference has none.
_IRRELEVANT_ENDINGS = ("_token_id", "_token_ids", "dropout", "dropout_prob", "pdrop")


def _only(*values: Any) -> Callable[[Any, ModelConfig], bool]:
  return lambda value, config: value in values


def _is_score_scale(value: Any, config: ModelConfig) -> bool:
  return isinstance(value, float) and math.isclose(value, config.head_dim**-0.5)


def _is_uniform_window(value: Any, config: ModelConfig) -> bool:
  kind = "full_attention" if config.sliding_window is None else "sliding_attention"
  return value == [kind] * config.num_layers


# Keys that change what is computed unless the function of (value, config) returns True. Families
# may read some of these keys themselves.
_NEUTRAL: dict[str, Callable[[Any, ModelConfig], bool]] = {
  "is_causal": _only(True),
  "use_bidirectional_attention": _only(False),
  "is_encoder_decoder": _only(False),
  "add_cross_attention": _only(False),
  "pruned_heads": _only({}),
  **dict.fromkeys(
    ("attention_bias", "mlp_bias", "bias", "use_bias"),
    lambda value, config: value == config.use_bias,
  ),
  "lm_head_bias": lambda value, config: value == config.use_bias,
  "qk_layernorm": _only(False),
  "use_qk_norm": _only(False),
  "head_dim": lambda value, config: value == config.head_dim,
  "sliding_window": lambda value, config: value == config.sliding_window,
  "use_sliding_window": lambda value, config: value == (config.sliding_window is not None),
  "max_window_layers": lambda value, config: config.sliding_window is None,
  "layer_types": _is_uniform_window,
  "no_rope_layers": lambda value, config: value in ([], [1] * config.num_layers),  # 1: rotated
  "rope_interleaved": _only(False),
  "use_mrope": _only(False),
  # Phi-4-mini
  "full_attn_mod": _only(1),
  "interpolate_factor": _only(1),
  "alibi": _only(False),
  "attn_logit_softcapping": _only(0),
  "final_logit_softcapping": _only(0),
  "query_pre_attn_scalar": lambda value, config: value == config.head_dim,
  "attention_multiplier": _is_score_scale,
  "embedding_multiplier": _only(1),
  "residual_multiplier": _only(1),
  "logit_scale": _only(1),
  "logits_scaling": _only(1),
  "clip_qkv": _only(0),
  "num_experts": _only(0),
  "num_local_experts": _only(0),
  "num_experts_per_tok": _only(0),
  **dict.fromkeys(QUANTISATION_KEYS, _only({})),
}


def check_keys(
  hf: Mapping[str, Any], used: Collection[str], config: ModelConfig, family: str
) -> None:
  """Checks that keys of config.json which are not read cannot change what the model computes.

  Args:
    hf: The parsed file.
    used: The keys that the family reads.
    config: The architecture read from these keys.
    family: The name of the family, for messages.

  Raises:
    NotImplementedError: Keys are unknown, or have a value that the family's models do not support.
      The message lists them all. Null values are ignored.
  """
  different, unknown = [], []
  for name, value in hf.items():
    irrelevant = name in _IRRELEVANT or name.endswith(_IRRELEVANT_ENDINGS)
    if value is None or irrelevant or name in used:
      continue
    if name not in _NEUTRAL:
      unknown.append(f"{name}={_shown(value)}{did_you_mean(name, used)}")
    elif not _NEUTRAL[name](value, config):
      different.append(f"{name}={_shown(value)}")
  if different:
    raise NotImplementedError(
      f"config.json has {', '.join(different)}, which is not supported for {family} models; "
      f"convert a model without it"
    )
  if unknown:
    keys = "it" if len(unknown) == 1 else "them"
    raise NotImplementedError(
      f"config.json has {', '.join(unknown)}, unknown to LL3M: what the model computes may "
      f"depend on {keys}; if not, remove {keys} from config.json"
    )


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
