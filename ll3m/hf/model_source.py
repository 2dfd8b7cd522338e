"""Opens a model of any kind that a command accepts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from ll3m import families
from ll3m.core import checkpoint
from ll3m.hf import folder_contents
from ll3m.hf.model_files import open_model
from ll3m.hf.published_model import HfModel
from ll3m.hf.validation import check_parameters

_HF_PREFIX = "hf::"


# Both define path, family, config, step, tokenizer_dir, source_dir, config_files, load_params and
# save_companions, with the same meaning.
ModelOnDisk = checkpoint.Checkpoint | HfModel


def open_source(name: str, *, verify: bool = True) -> ModelOnDisk:
  """Opens a model without reading its weights.

  Args:
    name: The path of a converted folder, a run's output_dir, a step folder, a Hugging Face folder
      or a GGUF file. `hf::PATH` accepts only the last two.
    verify: Whether the files of LL3M checkpoints are compared with their checksums.

  Raises:
    FileNotFoundError: The folder does not exist.
    ValueError: The model is incomplete or damaged.
    NotImplementedError: The format or the architecture is not supported.
  """
  if name.startswith(_HF_PREFIX):
    return open_model(name.removeprefix(_HF_PREFIX))
  if folder_contents.is_published(epath.Path(name)):
    return open_model(name)
  return open_converted(name, verify=verify)


def open_converted(path: str, *, verify: bool = True) -> checkpoint.Checkpoint:
  """Opens an LL3M checkpoint: a converted folder, a run's output_dir or a step folder.

  Args:
    path: The folder.
    verify: Whether files are compared with the checksums saved with them.

  Raises:
    FileNotFoundError: The folder does not exist.
    ValueError: The checkpoint is incomplete or damaged, or the folder is of another kind, such as a
      published model or an adapter, which the message names.
  """
  try:
    found = checkpoint.open_checkpoint(path, verify=verify)
  except ValueError as error:
    folder = checkpoint.absolute(path)
    ours = (folder / checkpoint.MANIFEST, folder / checkpoint.STEPS, folder / checkpoint.META)
    kind = None if any(file.exists() for file in ours) else folder_contents.published_kind(folder)
    if kind is None:
      raise
    raise ValueError(kind) from error

  def check(arrays: Mapping[str, Any]) -> None:
    family = families.FAMILIES[found.family]
    check_parameters(family, found.config, arrays, str(found.params_path))

  return dataclasses.replace(found, check_params=check)
