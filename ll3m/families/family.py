"""What a family of models is in Hugging Face's terms: a `config.json` and rules for its tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ll3m.core.model_config import ModelConfig, check_type
from ll3m.families.known_keys import check_keys
from ll3m.families.quantisation import refuse_quantised_config
from ll3m.families.rope import KEYS as ROPE_KEYS
from ll3m.families.rope import Rope, read_rope
from ll3m.families.rope import to_hf as rope_to_hf
from ll3m.families.tensor_rules import Rule

REQUIRED = object()

# What every family reads beside its own keys.
_READ_KEYS = ("model_type", "architectures", "hidden_act", "hidden_activation")


@dataclasses.dataclass(frozen=True)
class Key:
  """One field of ours and the config.json key that gives it.

  Attributes:
    ours: the `ModelConfig` field.
    hf: the key.
    default: what a missing or null key means; REQUIRED if it must be there.
  """

  ours: str
  hf: str
  default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models, as data; `ll3m/families/` has one file for each.

  Attributes:
    name: how users call it.
    model_type: `model_type` in config.json.
    architecture: the class that transformers loads it with.
    switches: `ModelConfig` fields with one value in the whole family.
    keys: the fields that config.json gives.
    activations: config.json's activation names, each with ours; the first is what we write.
    fixed: keys that may only have this value, because the family's models know no other.
    rules: the tensors.
    ignored_buffers: regular expressions of tensor names that published files hold beside the
      parameters and that can be computed from the config.
    presets: the published models by name.
    aliases: other names of presets.
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

  def from_hf_config(self, hf: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json, in the published style or in that of transformers 5.

    Args:
      hf: the parsed file.

    Returns:
      The architecture.

    Raises:
      ValueError: a required key is missing or a value makes no sense.
      NotImplementedError: the file asks for something that the decoder does not do.
    """
    refuse_quantised_config(hf)
    self._check_architecture(hf)
    fields = dict(self.switches)
    for key in self.keys:
      value = hf.get(key.hf)
      if value is None:
        if key.default is REQUIRED:
          raise ValueError(f"config.json of a {self.name} model lacks {key.hf!r}")
        value = key.default
      else:
        check_type(key.ours, value, f"{key.hf} of config.json")
      fields[key.ours] = value
    if "sliding_window" in hf and "sliding_window" in fields:
      fields["sliding_window"] = hf["sliding_window"]  # null says: no window
    for name, expected in self.fixed.items():
      if hf.get(name, expected) not in (expected, None):
        raise NotImplementedError(
          f"config.json has {name}={hf[name]!r}; {self.name} models here support {expected!r} only"
        )
    rope = read_rope(hf)
    fields |= {"rope_theta": rope.theta, "rope_scaling_factor": rope.scaling_factor}
    if "rotary_fraction" in fields:
      if rope.fraction is not None:
        fields["rotary_fraction"] = rope.fraction
    elif rope.fraction not in (None, 1):
      raise NotImplementedError(
        f"config.json has partial_rotary_factor={rope.fraction}; {self.name} models rotate whole "
        f"heads"
      )
    fields["activation"] = self._activation(hf)
    if fields.get("num_kv_heads") is None:
      fields["num_kv_heads"] = fields["num_heads"]
    if fields.get("head_dim") is None:
      if fields["num_heads"] < 1 or fields["d_model"] % fields["num_heads"]:
        raise ValueError(
          f"config.json gives no head_dim and hidden_size {fields['d_model']} is not a multiple "
          f"of num_attention_heads {fields['num_heads']}"
        )
      fields["head_dim"] = fields["d_model"] // fields["num_heads"]
    config = ModelConfig.from_dict(fields)
    used = {key.hf for key in self.keys} | self.fixed.keys() | {*_READ_KEYS, *ROPE_KEYS}
    check_keys(hf, used, config, self.name)
    return config

  def to_hf_config(self, config: ModelConfig) -> dict[str, Any]:
    """Writes the config.json of a model: the inverse of `from_hf_config`.

    Rotary parameters are given in both styles, so that every transformers since 4.38 reads them.

    Raises:
      ValueError: the config has something that the family's config.json cannot say.
    """
    activation = next((k for k, v in self.activations.items() if v == config.activation), None)
    if activation is None:
      raise ValueError(f"a {self.name} model cannot have activation={config.activation!r}")
    hf: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
    hf |= {key.hf: getattr(config, key.ours) for key in self.keys}
    hf |= dict(self.fixed) | {"hidden_act": activation}
    fraction = config.rotary_fraction if "rotary_fraction" in self.switches else None
    hf |= rope_to_hf(Rope(config.rope_theta, config.rope_scaling_factor, fraction))
    if "head_dim" not in hf and config.head_dim * config.num_heads != config.d_model:
      raise ValueError(
        f"a {self.name} model has head_dim = d_model / num_heads ({config.d_model} / "
        f"{config.num_heads}), and its config.json cannot say {config.head_dim}"
      )
    understood = self.from_hf_config(hf).to_dict()
    for name, value in config.to_dict().items():
      if understood[name] != value:
        raise ValueError(
          f"a {self.name} model has {name}={understood[name]!r}, and its config.json cannot say "
          f"{value!r}"
        )
    return hf

  def _check_architecture(self, hf: Mapping[str, Any]) -> None:
    """Raises if the file's weights are another class's: another head, or attention both ways."""
    names = hf.get("architectures") or [self.architecture]
    names = names if isinstance(names, list) else [names]
    # Files of early 2023 write LLaMAForCausalLM.
    if [str(name).lower() for name in names] != [self.architecture.lower()]:
      raise NotImplementedError(
        f"config.json has architectures={names!r}; of {self.name} models only "
        f"{self.architecture} is supported"
      )

  def _activation(self, hf: Mapping[str, Any]) -> str:
    # Gemma's files of 2024 have both keys, and the second one is right.
    name = hf.get("hidden_activation") or hf.get("hidden_act") or next(iter(self.activations))
    if not isinstance(name, str) or name not in self.activations:
      raise NotImplementedError(
        f"config.json has the activation {name!r}; {self.name} models here support "
        f"{', '.join(self.activations)}"
      )
    other = hf.get("hidden_act") or name
    if self.activations.get(str(other)) != self.activations[name]:
      raise ValueError(
        f"config.json has hidden_activation={name!r} and hidden_act={other!r}, which contradict "
        f"each other; keep the right one"
      )
    return self.activations[name]
