"""Types of layers in config.json: which have a window, and which a rotary embedding."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ll3m.core.model_config import ModelConfig

_NAMES = {"full_attention": "full", "sliding_attention": "sliding"}
_HF_NAMES = {"full": "full_attention", "sliding": "sliding_attention", "no_rope": "full_attention"}


class Convention(NamedTuple):
  """How the config.json files of a family name the types of layers.

  Attributes:
    types: Function of the parsed file and L to the type of each layer, for files without the key
      `layer_types`.
    keys: Keys that `types` reads.
    to_hf: Function of the architecture to the values of these keys.
    no_rope: Function of the parsed file and L to whether each layer has no rotary embedding.
  """

  types: Callable[[Mapping[str, Any], int], list[str]]
  keys: tuple[str, ...]
  to_hf: Callable[[ModelConfig], dict[str, Any]]
  no_rope: Callable[[Mapping[str, Any], int], list[bool]] = lambda hf, layers: [False] * layers


def read_layer_types(
  convention: Convention, hf: Mapping[str, Any], num_layers: int, window: int | None
) -> tuple[str, ...]:
  """Returns the type of each layer, as in `ModelConfig.layer_types`.

  Args:
    convention: The family's convention.
    hf: The parsed config.json.
    num_layers: L, the number of layers.
    window: The window of layers that have one; None if none has.

  Raises:
    ValueError: The number of types is not the number of layers.
    NotImplementedError: A type is unknown, or a layer has a window but no rotary embedding.
  """
  given = hf.get("layer_types")
  if given is None:
    types = convention.types(hf, num_layers)
  elif not isinstance(given, list) or len(given) != num_layers:
    raise ValueError(f"layer_types of config.json must list {num_layers} layers, got {given!r}")
  elif unknown := sorted({str(name) for name in given} - _NAMES.keys()):
    raise NotImplementedError(
      f"config.json has layer_types {', '.join(unknown)}; supported are {', '.join(_NAMES)}"
    )
  else:
    types = [_NAMES[name] for name in given]
  if window is None:
    types = ["full"] * num_layers
  without = convention.no_rope(hf, num_layers)
  if any(bare and name == "sliding" for bare, name in zip(without, types, strict=True)):
    raise NotImplementedError(
      "config.json has layers with a window but without a rotary embedding, which is not supported"
    )
  return tuple("no_rope" if bare else name for bare, name in zip(without, types, strict=True))


def layer_types(config: ModelConfig) -> list[str]:
  """Returns the value of the key `layer_types`."""
  return [_HF_NAMES[name] for name in config.all_layer_types]


def _count(hf: Mapping[str, Any], key: str, default: int) -> int:
  value = hf.get(key)
  if value is None:
    return default
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise ValueError(f"{key} of config.json must be a whole number, got {value!r}")
  return value


def _every(period: int, num_layers: int) -> list[str]:
  """Returns the types of layers of which every period-th one has no window."""
  return ["full" if (i + 1) % period == 0 else "sliding" for i in range(num_layers)]


def _qwen_types(hf: Mapping[str, Any], num_layers: int) -> list[str]:
  first = _count(hf, "max_window_layers", 28)
  return ["sliding" if i >= first else "full" for i in range(num_layers)]


def _qwen_keys(config: ModelConfig) -> dict[str, Any]:
  types = layer_types(config)
  sliding = types.index("sliding_attention") if "sliding_attention" in types else len(types)
  return {"use_sliding_window": config.sliding_window is not None, "max_window_layers": sliding}


def _gemma3_types(hf: Mapping[str, Any], num_layers: int) -> list[str]:
  period = _count(hf, "sliding_window_pattern", _count(hf, "_sliding_window_pattern", 6))
  if period < 1:
    raise ValueError(f"sliding_window_pattern of config.json must be positive, got {period}")
  return _every(period, num_layers)


def _smollm3_without(hf: Mapping[str, Any], num_layers: int) -> list[bool]:
  flags = hf.get("no_rope_layers")
  if not flags:
    interval = _count(hf, "no_rope_layer_interval", 4)
    if interval < 1:
      raise ValueError(f"no_rope_layer_interval of config.json must be positive, got {interval}")
    return [(i + 1) % interval == 0 for i in range(num_layers)]
  is_list = isinstance(flags, list) and all(flag in (0, 1) for flag in flags)
  if not is_list or len(flags) < num_layers:
    raise ValueError(
      f"no_rope_layers of config.json must list 0 or 1 for {num_layers} layers, got {flags!r}"
    )
  return [not flag for flag in flags[:num_layers]]


def _smollm3_keys(config: ModelConfig) -> dict[str, Any]:
  kinds = config.layer_kinds
  return {
    "no_rope_layers": [int(kind.rope is not None) for kind in kinds],
    "use_sliding_window": config.sliding_window is not None,
  }


# Qwen: layers from max_window_layers on have a window, if use_sliding_window is set.
QWEN = Convention(_qwen_types, ("use_sliding_window", "max_window_layers"), _qwen_keys)
# Gemma 2: the first layer and every second one after it have a window.
GEMMA2 = Convention(lambda hf, num_layers: _every(2, num_layers), (), lambda config: {})
# Gemma 3: all but every sixth layer have a window.
GEMMA3 = Convention(
  _gemma3_types, ("sliding_window_pattern", "_sliding_window_pattern"), lambda config: {}
)
# SmolLM3: every fourth layer has no rotary embedding.
SMOLLM3 = Convention(
  lambda hf, num_layers: ["full"] * num_layers,
  ("no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "max_window_layers"),
  _smollm3_keys,
  _smollm3_without,
)
