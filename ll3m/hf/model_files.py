"""Opens a published model in any supported file format, without reading its weights."""

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from ll3m import families
from ll3m.core.object_store import is_remote
from ll3m.hf import folder_contents, multimodal, safetensors_io, torch_bin
from ll3m.hf.lazy_tensor import LazyTensor
from ll3m.hf.published_model import HfModel
from ll3m.hf.quantised_tensors import refuse_quantised_tensors
from ll3m.hf.validation import listing, match_tensors

CHECKPOINT_TYPES = ("safetensors", "pt", "gguf")
CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"

_TOKENIZER_FILES = (
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.*",
  "merges.txt",
  "*.model",
  "chat_template*",
)


def open_model(
  path: str | os.PathLike,
  checkpoint_type: str | None = None,
  preset: str | None = None,
  *,
  text_only: bool = False,
) -> HfModel:
  """Finds a model's weights, infers its architecture, and checks that the two agree.

  Args:
    path: A folder with config.json and weights, a GGUF file, or a folder with a GGUF file.
    checkpoint_type: One of CHECKPOINT_TYPES; None selects safetensors, then pt, then gguf.
    preset: The preset that the model must match; required only if there is no config.json.
    text_only: Whether to open the text model of a multimodal one.

  Raises:
    ValueError: The config contradicts the weights or the preset, or files are damaged.
    NotImplementedError: The format or the architecture is not supported, the folder holds an
      adapter, or the weights are quantised.
    FileNotFoundError: The folder does not exist or holds no model.
  """
  if is_remote(path):
    raise NotImplementedError(f"published models are read from a local disk, got {path}")
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"no such file or folder: {path}")
  expected = families.get_preset(preset) if preset else None
  problems: list[str] = []
  kind = checkpoint_type or detect_type(path)
  if kind == "gguf":
    from ll3m.hf import gguf  # slow to import and rarely needed

    file = gguf.open_gguf(_find_gguf(path))
    hf_config, tensors = file.config, file.tensors
    config_files = {
      name: (json.dumps(content, indent=2) + "\n").encode()
      for name, content in (
        (CONFIG_NAME, hf_config),
        (GENERATION_CONFIG_NAME, file.generation_config),
      )
      if content
    }
    tokenizer_files = file.tokenizer_files
  else:
    _refuse_links_out(path)
    config_files = {
      name: (path / name).read_bytes()
      for name in (CONFIG_NAME, GENERATION_CONFIG_NAME)
      if (path / name).is_file()
    }
    hf_config = _parse_config(path, config_files.get(CONFIG_NAME))
    tokenizer_files = {
      file.name: file.read_bytes
      for pattern in _TOKENIZER_FILES
      for file in sorted(path.glob(pattern))
      if file.is_file()
    }
  multimodal.check_text_only(hf_config, str(path), text_only=text_only)
  found = None if text_only else _resolve(expected, hf_config, path)
  omitted: tuple[str, ...] = ()
  if kind != "gguf":  # after config.json, which may say why the weights cannot be read
    tensors, problems = _read_headers(path, kind)
    refuse_quantised_tensors(tensors, str(path))
  if text_only:
    hf_config, tensors, omitted = multimodal.text_model(hf_config, tensors)
    config_files[CONFIG_NAME] = (json.dumps(hf_config, indent=2) + "\n").encode()
    found = _resolve(expected, hf_config, path)
  match = match_tensors(*found, tensors, str(path), problems)
  return HfModel(
    path,
    kind,
    found.family.name,
    found.config,
    match.specs,
    match.tensors,
    (*match.ignored, *omitted),
    config_files,
    tokenizer_files,
  )


def detect_type(path: Path) -> str:
  """Returns the type of the weights in a folder or file, one of CHECKPOINT_TYPES.

  Raises:
    ValueError: The file is not a .gguf file.
    NotImplementedError: The folder holds an adapter or weights in another format.
    FileNotFoundError: The folder holds no weights.
  """
  if path.is_file():
    if path.suffix != ".gguf":
      raise ValueError(f"expected a folder or a .gguf file, got {path}")
    return "gguf"
  if other := folder_contents.other_kind(path):
    raise NotImplementedError(other)
  for kind, pattern in zip(CHECKPOINT_TYPES, ("*.safetensors*", "*.bin*", "*.gguf"), strict=True):
    if any(path.glob(pattern)):
      return kind
  raise FileNotFoundError(f"{path} holds no *.safetensors, *.bin or *.gguf file")


def _refuse_links_out(folder: Path) -> None:
  """Checks that no link leads out of a folder, except into the Hub cache that contains it.

  A folder from an unknown source must not make LL3M read the user's other files.

  Raises:
    ValueError: A link leads elsewhere.
  """
  homes = [folder.resolve()]
  if homes[0].parent.name == "snapshots":  # the Hub's cache keeps files in `blobs` beside it
    homes.append(homes[0].parents[1] / "blobs")
  for file in sorted(folder.iterdir()) if folder.is_dir() else ():
    target = file.resolve()
    if file.is_symlink() and not any(target.is_relative_to(home) for home in homes):
      raise ValueError(
        f"{file} is a link to {target}, outside its folder; only files inside the folder are read"
      )


def _find_gguf(path: Path) -> Path:
  if path.is_file():
    return path
  files = sorted(path.glob("*.gguf"))
  if len(files) != 1:
    raise ValueError(
      f"{path} holds {len(files)} .gguf files ({', '.join(f.name for f in files)}), expected one; "
      f"give the path of one file"
    )
  return files[0]


def _parse_config(path: Path, text: bytes | None) -> dict[str, Any] | None:
  if text is None:
    return None
  try:
    config = json.loads(text)
  except ValueError as error:
    raise ValueError(f"{path / CONFIG_NAME} is not JSON: {error}") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path / CONFIG_NAME} must hold an object, got {type(config).__name__}")
  return config


def _resolve(
  expected: families.Preset | None, hf_config: dict[str, Any] | None, path: Path
) -> families.Preset:
  """Returns the architecture of config.json, after checking that it is the expected one."""
  if hf_config is None:
    if expected is None:
      raise FileNotFoundError(f"{path} has no {CONFIG_NAME}; give `model`")
    return expected
  found = families.from_hf_config(hf_config)
  if expected is None:
    return found
  wanted, given = ({"family": f.name} | c.to_dict() for f, c in (expected, found))
  differing = [
    f"{name} (expected {wanted[name]}, got {given[name]})"
    for name in wanted
    if wanted[name] != given[name]
  ]
  if differing:
    raise ValueError(f"`model` does not match {path}: {', '.join(differing)}")
  return found


def _read_headers(path: Path, kind: str) -> tuple[dict[str, LazyTensor], list[str]]:
  """Returns the tensors of all files of a checkpoint, and contradictions of files and index."""
  module, read, suffix = {
    "safetensors": (safetensors_io, safetensors_io.read_safetensors, "safetensors"),
    "pt": (torch_bin, torch_bin.read_torch_bin, "bin"),
  }[kind]
  index = path / module.INDEX_NAME
  if (path / module.SINGLE_NAME).is_file():
    return read(path / module.SINGLE_NAME), []
  if not index.is_file():
    files = sorted(path.glob(f"*.{suffix}"))
    if len(files) != 1:
      raise FileNotFoundError(
        f"{path} has neither {module.SINGLE_NAME} nor {module.INDEX_NAME}, and "
        f"{len(files)} *.{suffix} files"
      )
    return read(files[0]), []
  tensors: dict[str, LazyTensor] = {}
  held: dict[str, set[str]] = {}  # the names of the tensors in each file
  problems = []
  weight_map = _parse_index(index)
  for name in sorted(set(weight_map.values())):
    if not (path / name).is_file():
      problems.append(f"{index.name} names {name}, which does not exist")
      continue
    found = read(path / name)
    if twice := sorted(tensors.keys() & found.keys()):
      problems.append(f"{name} repeats tensors of another file {listing(twice)}")
    tensors |= found
    held[name] = set(found)
  if misplaced := [n for n, file in weight_map.items() if n not in held.get(file, {n})]:
    problems.append(f"{index.name} names tensors that its files lack {listing(misplaced)}")
  if beside := [name for name in tensors if name not in weight_map]:
    problems.append(f"{index.name} does not name tensors of its files {listing(beside)}")
  return tensors, problems


def _parse_index(index: Path) -> dict[str, str]:
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
    items = dict(weight_map).items()
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{index} is not a weight index") from error
  for name, file in items:
    if not isinstance(file, str) or PurePosixPath(file).name != file or file in ("", ".", ".."):
      raise ValueError(f"{index} places {name} in {file!r}; only files of the same folder are read")
  return dict(items)
