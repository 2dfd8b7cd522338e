"""The text model within a multimodal one: its config.json and its tensors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ll3m.families import gemma3
from ll3m.hf.lazy_tensor import LazyTensor
from ll3m.hf.token_settings import TOKEN_KEYS

# The text family of each multimodal model_type, and its sizes where `text_config` omits them.
_TEXT_FAMILIES = {"gemma3": (gemma3.FAMILY, gemma3.TEXT_DEFAULTS)}
# Prefixes of the text model's tensors, and what they become: before transformers 4.52, and since.
_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
_HEAD = "lm_head.weight"


class TextModel(NamedTuple):
  """The text model of a multimodal checkpoint.

  Attributes:
    config: The equivalent config.json of a text model.
    tensors: Its tensors, by their names in such a model.
    omitted: The names of all other tensors.
  """

  config: dict[str, Any]
  tensors: dict[str, LazyTensor]
  omitted: tuple[str, ...]


def check_text_only(hf: Mapping[str, Any] | None, path: str, *, text_only: bool) -> None:
  """Checks that a multimodal model is opened with `text_only`, and no other is.

  Raises:
    NotImplementedError: The model is multimodal, and its text model was not asked for.
    ValueError: `text_only` was given for a text model.
  """
  is_multimodal = hf is not None and hf.get("model_type") in [*_TEXT_FAMILIES]
  if is_multimodal and not text_only:
    raise NotImplementedError(
      f"{path} holds a multimodal model ({hf['model_type']}), of which only the text model is "
      f"supported: convert it with `text_only`, which omits the other tensors"
    )
  if text_only and not is_multimodal:
    raise ValueError(
      f"`text_only` is for multimodal models ({', '.join(_TEXT_FAMILIES)}), and {path} holds none"
    )


def text_model(hf: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> TextModel:
  """Returns the text model of a multimodal checkpoint.

  Args:
    hf: The parsed config.json, which `check_text_only` has accepted.
    tensors: All tensors of the checkpoint.

  Raises:
    ValueError: config.json has no `text_config`.
  """
  family, defaults = _TEXT_FAMILIES[hf["model_type"]]
  text = hf.get("text_config")
  if not isinstance(text, Mapping):
    raise ValueError(f"config.json of a {hf['model_type']} model lacks the object 'text_config'")
  shared = {k: hf[k] for k in (*TOKEN_KEYS, "torch_dtype", "dtype") if hf.get(k) is not None}
  own = {key: value for key, value in text.items() if value is not None}
  names = {"architectures": [family.architecture], "model_type": family.model_type}
  found, omitted = {}, []
  for name, tensor in tensors.items():
    prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
    if prefix is not None:
      found[_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    elif name == _HEAD:
      found[name] = tensor
    else:
      omitted.append(name)
  return TextModel({**defaults, **shared, **own, **names}, found, tuple(omitted))
