"""Opens a model from any place that a command may name."""

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


# Both have path, family, config, step, tokenizer_dir, source_dir, config_files, load_params and
# save_companions, which mean the same.
ModelOnDisk = checkpoint.Checkpoint | HfModel


def open_source(name: str, *, verify: bool = True) -> ModelOnDisk:
  """Opens a model without reading its weights.

  Args:
    name: The path of a converted folder, a run's output_dir, one step folder, a Hugging Face folder
      or a GGUF file; `hf::PATH` for one of the last two and nothing else.
    verify: Whether the files of what is ours are compared with their checksums.

  Raises:
    FileNotFoundError: There is no such folder.
    ValueError: It is not a complete model, or a damaged one.
    NotImplementedError: A format or an architecture that is not supported.
  """
  if name.startswith(_HF_PREFIX):
    return open_model(name.removeprefix(_HF_PREFIX))
  if folder_contents.is_published(epath.Path(name)):
    return open_model(name)
  return open_converted(name, verify=verify)


def open_converted(path: str, *, verify: bool = True) -> checkpoint.Checkpoint:
  """Opens what is ours: a converted folder, a run's output_dir or one step folder.

  Args:
    path: The folder.
    verify: Whether files are compared with the checksums that were saved with them.

  Raises:
    FileNotFoundError: There is no such folder.
    ValueError: It is not a complete model, or a damaged one; of other kinds of folder (a published
      model, an adapter) the message says what they are.
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
