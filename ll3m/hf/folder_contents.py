"""Describes what a folder holds if it holds no readable model, for error messages."""

import fnmatch
import json
from collections.abc import Sequence

from etils import epath

from ll3m.core.checkpoint import MANIFEST, META, STEPS
from ll3m.core.object_store import is_remote

ADAPTER_CONFIG = "adapter_config.json"

# File names of weights in unsupported formats, with a description of each format.
_OTHER_FORMATS = {
  "consolidated*.pth": "a model in Meta's original format",
  "consolidated*.safetensors": "a model in Mistral's own format",
  "tf_model*.h5": "a TensorFlow model",
  "flax_model*.msgpack": "a Flax model",
  "model.ckpt*": "a TensorFlow 1 checkpoint",
  "*.onnx": "an ONNX model",
  "weights*.npz": "an MLX model",
  "openvino_model*.xml": "an OpenVINO model",
  "*.nemo": "a NeMo model",
  "*.pth": "a model saved by torch (.pth)",
  "*.pt": "a model saved by torch (.pt)",
  "*.ckpt": "a model saved by PyTorch Lightning",
}
_READ = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")
# Files that match `_READ` but are not a model's weights: state of a training run, adapters of PEFT
# and MLX, and Mistral's own format.
_STATE = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*")
_NOT_WEIGHTS = (
  *_STATE, "adapter_model*", "adapters*.safetensors", "*_adapters.safetensors",
  "consolidated*.safetensors",
)  # fmt: skip


def other_kind(folder: epath.PathLike) -> str | None:
  """Describes what a folder without weights holds instead, and what to do about it.

  Args:
    folder: An existing folder.

  Returns:
    A sentence for an error message. None if the folder has weights or holds nothing recognised.
  """
  folder = epath.Path(folder)
  names = sorted(file.name for file in folder.iterdir())
  if has_weights(names):
    return None
  if MANIFEST in names:
    return f"{folder} is already converted to LL3M's format; use it without hf:: or ll3m.convert"
  if ADAPTER_CONFIG in names:
    return f"{folder} holds {_adapter(folder)}"
  for pattern, kind in _OTHER_FORMATS.items():
    found = [name for name in fnmatch.filter(names, pattern) if not _matches(name, _STATE)]
    if found:
      return (
        f"{folder} holds {kind} ({found[0]}); expected Hugging Face's format: config.json with "
        f"*.safetensors or pytorch_model*.bin files, or a .gguf file"
      )
  inner = [name for name in names if (folder / name).is_dir() and _is_model(folder / name)]
  if inner:
    return f"{folder} holds no model, but its subfolders do; give one of them ({', '.join(inner)})"
  return None


def is_published(path: epath.PathLike) -> bool:
  """Returns whether a path is a Hugging Face folder or a GGUF file on a local disk."""
  if is_remote(path):
    return False
  path = epath.Path(path).expanduser()
  if not path.is_dir():
    return path.suffix == ".gguf"
  if any((path / name).exists() for name in (MANIFEST, STEPS, META)):  # an LL3M model
    return False
  return (path / "config.json").exists() or any(path.glob("*.gguf"))


def published_kind(folder: epath.PathLike) -> str | None:
  """Describes a folder that is not an LL3M checkpoint; returns None if it is not recognised."""
  if found := other_kind(folder):
    return found
  if is_published(folder):
    return f"{folder} is a published model, not a converted one; run ll3m.convert first"
  return None


def has_weights(names: Sequence[str]) -> bool:
  """Returns whether file names include weights in a supported format."""
  return any(_matches(name, _READ) and not _matches(name, _NOT_WEIGHTS) for name in names)


def _is_model(folder: epath.Path) -> bool:
  names = [file.name for file in folder.iterdir()]
  return "config.json" in names and has_weights(names)


def _matches(name: str, patterns: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _adapter(folder: epath.Path) -> str:
  try:
    settings = json.loads((folder / ADAPTER_CONFIG).read_text())
  except (OSError, ValueError):
    settings = {}
  settings = settings if isinstance(settings, dict) else {}
  # MLX's keys are fine_tune_type and model.
  kind = str(settings.get("peft_type") or settings.get("fine_tune_type") or "PEFT")
  kind = {"lora": "LoRA", "dora": "DoRA"}.get(kind.lower(), kind)
  base = settings.get("base_model_name_or_path") or settings.get("model") or "an unnamed base"
  article = "an" if kind[0] in "AEIO" else "a"
  return (
    f"{article} {kind} adapter of {base}, not a model: merge it into its base model (peft's "
    f"merge_and_unload, then save_pretrained) and give the merged folder"
  )
