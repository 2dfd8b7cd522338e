"""What a family of models is in Hugging Face's terms: a `config.json` and rules for its tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ll3m.core.config import ModelConfig, check_type
from ll3m.hf.mapping import Rule

REQUIRED = object()


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
    rope = _rope_parameters(hf)
    fields["rope_theta"] = rope.get("rope_theta", 10_000.0)
    check_type("rope_theta", fields["rope_theta"], "rope_theta of config.json")
    fraction = rope.get("partial_rotary_factor")
    if "rotary_fraction" in fields:
      fields["rotary_fraction"] = fields["rotary_fraction"] if fraction is None else fraction
    elif fraction not in (None, 1, 1.0):
      raise NotImplementedError(
        f"config.json has partial_rotary_factor={fraction}; {self.name} models rotate whole heads"
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
    return ModelConfig.from_dict(fields)

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
    rope = {"rope_theta": config.rope_theta}
    if "rotary_fraction" in self.switches:
      rope["partial_rotary_factor"] = config.rotary_fraction
    hf |= rope | {"rope_parameters": {"rope_type": "default"} | rope}
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

  def _activation(self, hf: Mapping[str, Any]) -> str:
    # Gemma's files of 2024 have both keys, and the second one is right.
    name = hf.get("hidden_activation") or hf.get("hidden_act") or next(iter(self.activations))
    if not isinstance(name, str) or name not in self.activations:
      raise NotImplementedError(
        f"config.json has the activation {name!r}; {self.name} models here support "
        f"{', '.join(self.activations)}"
      )
    return self.activations[name]


def _rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
  """Joins the two styles of rotary parameters; refuses scaled ones."""
  nested = {}
  for name in ("rope_scaling", "rope_parameters"):
    value = hf.get(name) or {}
    if not isinstance(value, Mapping):
      raise ValueError(f"{name} of config.json must be an object or null, got {value!r}")
    nested |= value
  kind = nested.get("rope_type", nested.get("type", "default"))
  if kind not in ("default", None):
    raise NotImplementedError(
      f"config.json asks for rotary scaling of type {kind!r}; only unscaled rotary embeddings "
      f"are supported"
    )
  top = {k: hf[k] for k in ("rope_theta", "partial_rotary_factor") if hf.get(k) is not None}
  return top | nested
