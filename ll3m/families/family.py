"""Model families in Hugging Face's terms: a `config.json` and rules for the tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ll3m.core.model_config import ModelConfig, check_type
from ll3m.families import layers as layer_conventions
from ll3m.families.known_keys import check_keys
from ll3m.families.quantisation import refuse_quantised_config
from ll3m.families.rope import KEYS as ROPE_KEYS
from ll3m.families.rope import read_rope
from ll3m.families.rope import to_hf as rope_to_hf
from ll3m.families.tensor_rules import Rule

REQUIRED = object()

# Keys that every family reads in addition to its own.
_READ_KEYS = ("model_type", "architectures", "hidden_act", "hidden_activation")


@dataclasses.dataclass(frozen=True)
class Key:
  """A `ModelConfig` field and its key in config.json.

  Attributes:
    ours: The `ModelConfig` field.
    hf: The key in config.json.
    default: The meaning of a missing or null key; REQUIRED if the key must be present.
    nullable: Whether null means None instead of the default.
    whole: Whether config.json holds a whole number where `ModelConfig` has a float.
  """

  ours: str
  hf: str
  default: Any = REQUIRED
  nullable: bool = False
  whole: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models, as data; `ll3m/families/` has one module for each.

  Attributes:
    name: The name in messages and in checkpoints.
    model_type: The value of `model_type` in config.json.
    architecture: The class that transformers loads.
    switches: `ModelConfig` fields with the same value in the whole family.
    keys: The fields that config.json sets.
    activations: LL3M's activation names by those of config.json; the first is used on export.
    fixed: Keys with their only supported values.
    rules: The rules for the tensors.
    ignored_buffers: Regular expressions of names of tensors that published files may contain
      although they can be computed from the config.
    presets: The published models by name.
    aliases: Other names of presets.
    layers: How config.json names the types of layers; None if all layers are alike.
    rope_theta: The base of the rotary frequencies in files that do not set it.
    rope_local_theta: The same for layers with a window; None if they have the same base.
    computed: Function of the architecture to further keys on export.
  """

  name: str
  model_type: str
  architecture: str
  switches: Mapping[str, Any]
  keys: tuple[Key, ...]
  activations: Mapping[str, str]
  fixed: Mapping[str, Any]
  rules: tuple[Rule, ...]
  ignored_buffers: tuple[str, ...]
  presets: Mapping[str, ModelConfig]
  aliases: Mapping[str, str]
  layers: layer_conventions.Convention | None = None
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None
  computed: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}

  def from_hf_config(self, hf: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json in the published style or in that of transformers 5.

    Args:
      hf: The parsed file.

    Returns:
      The architecture.

    Raises:
      ValueError: A required key is missing or a value is invalid.
      NotImplementedError: The file requires a feature that the decoder does not support.
    """
    refuse_quantised_config(hf)
    self._check_architecture(hf)
    fields = dict(self.switches)
    for key in self.keys:
      value = hf.get(key.hf)
      if value is not None:
        check_type(key.ours, value, f"{key.hf} of config.json")
      elif not (key.nullable and key.hf in hf):
        if key.default is REQUIRED:
          raise ValueError(f"config.json of a {self.name} model lacks {key.hf!r}")
        value = key.default
      fields[key.ours] = value
    for name, expected in self.fixed.items():
      if hf.get(name, expected) not in (expected, None):
        raise NotImplementedError(
          f"config.json has {name}={hf[name]!r}; {self.name} models support only {expected!r}"
        )
    rope = read_rope(hf, theta=self.rope_theta, local_theta=self.rope_local_theta)
    fields |= rope.fields
    if "rotary_fraction" in fields:
      if rope.fraction is not None:
        fields["rotary_fraction"] = rope.fraction
    elif rope.fraction not in (None, 1):
      raise NotImplementedError(
        f"config.json has partial_rotary_factor={rope.fraction}; {self.name} models support only 1"
      )
    fields["activation"] = self._activation(hf)
    if fields.get("num_kv_heads") is None:
      fields["num_kv_heads"] = fields["num_heads"]
    if fields.get("head_dim") is None:
      if fields["num_heads"] < 1 or fields["d_model"] % fields["num_heads"]:
        raise ValueError(
          f"config.json has no head_dim, and hidden_size {fields['d_model']} is not a multiple "
          f"of num_attention_heads {fields['num_heads']}"
        )
      fields["head_dim"] = fields["d_model"] // fields["num_heads"]
    used = {key.hf for key in self.keys} | self.fixed.keys() | {*_READ_KEYS, *ROPE_KEYS}
    if self.layers is not None:
      used |= {"layer_types", *self.layers.keys}
      is_off = "use_sliding_window" in self.layers.keys and not hf.get("use_sliding_window")
      window = None if is_off else fields["sliding_window"]
      fields["sliding_window"] = window
      fields["layer_types"] = layer_conventions.read_layer_types(
        self.layers, hf, fields["num_layers"], window
      )
    config = ModelConfig.from_dict(fields)
    check_keys(hf, used, config, self.name)
    return config

  def to_hf_config(self, config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model: the inverse of `from_hf_config`.

    Rotary parameters are written in both styles, so that every transformers since 4.38 reads them.

    Raises:
      ValueError: The family's config.json cannot express the config.
    """
    activation = next((k for k, v in self.activations.items() if v == config.activation), None)
    if activation is None:
      raise ValueError(f"a {self.name} model cannot have activation={config.activation!r}")
    hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
    for key in self.keys:
      value = getattr(config, key.ours)
      hf[key.hf] = int(value) if key.whole and value == int(value) else value
    hf |= dict(self.fixed) | {"hidden_act": activation} | self.computed(config)
    if self.layers is not None:
      hf |= {"layer_types": layer_conventions.layer_types(config)} | self.layers.to_hf(config)
    fraction = config.rotary_fraction if "rotary_fraction" in self.switches else None
    hf |= rope_to_hf(config, fraction)
    if "head_dim" not in hf and config.head_dim * config.num_heads != config.d_model:
      raise ValueError(
        f"config.json of a {self.name} model cannot express head_dim={config.head_dim}; it implies "
        f"head_dim = d_model / num_heads ({config.d_model} / {config.num_heads})"
      )
    understood = self.from_hf_config(hf).to_dict()
    for name, value in config.to_dict().items():
      if understood[name] != value:
        raise ValueError(
          f"config.json of a {self.name} model cannot express {name}={value!r}; it implies "
          f"{understood[name]!r}"
        )
    return hf

  def _check_architecture(self, hf: Mapping[str, Any]) -> None:
    """Checks that the class is supported; others have another head or bidirectional attention."""
    names = hf.get("architectures") or [self.architecture]
    names = names if isinstance(names, list) else [names]
    # Files of early 2023 spell it LLaMAForCausalLM.
    if [str(name).lower() for name in names] != [self.architecture.lower()]:
      raise NotImplementedError(
        f"config.json has architectures={names!r}; {self.name} models support only "
        f"{self.architecture}"
      )

  def _activation(self, hf: Mapping[str, Any]) -> str:
    # Gemma's files of 2024 have both keys; hidden_activation is the correct one.
    name = hf.get("hidden_activation") or hf.get("hidden_act") or next(iter(self.activations))
    if not isinstance(name, str) or name not in self.activations:
      raise NotImplementedError(
        f"config.json has the activation {name!r}; {self.name} models support "
        f"{', '.join(self.activations)}"
      )
    other = hf.get("hidden_act") or name
    if self.activations.get(str(other)) != self.activations[name]:
      raise ValueError(
        f"config.json has hidden_activation={name!r} and hidden_act={other!r}, which contradict "
        f"each other; keep the correct one"
      )
    return self.activations[name]
