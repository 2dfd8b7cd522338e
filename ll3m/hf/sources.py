"""Opens a model from any place that a command may name, and loads its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from ll3m import families
from ll3m.core import checkpoint, parameter_store
from ll3m.core.checkpoint import Params
from ll3m.core.config import ModelConfig
from ll3m.hf import folders
from ll3m.hf.mapping import parameter_shapes
from ll3m.hf.matching import check_parameters
from ll3m.hf.model_files import HfModel, detect_type, open_model
from ll3m.hf.tensors import read_part

_HF_PREFIX = "hf::"


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A model on disk, converted or as it was published.

  Attributes:
    path: its folder.
    family: name of the family.
    config: the architecture.
    step: of a training run, in optimizer steps.
    tokenizer_dir: a folder with the tokenizer's files, if they are there.
    source_dir: a folder with the published config.json, if it is there.
    load_params: `(dtype=None, shardings=None) -> Haiku parameters`; each device reads only its
      own shards. Without shardings, everything goes to the first device.
    save_companions: writes the tokenizer and config files into `tokenizer/` and `hf/` of a folder.
  """

  path: epath.Path
  family: str
  config: ModelConfig
  step: int | None
  tokenizer_dir: epath.Path | None
  source_dir: epath.Path | None
  load_params: Callable[..., Params]
  save_companions: Callable[[epath.Path], None]


def open_source(name: str, *, verify: bool = True) -> ModelSource:
  """Opens a model without reading its weights.

  Args:
    name: `hf::DIR` for a published folder, or the path of a converted folder, a run's output_dir
      or one step folder.
    verify: compare the files of what is ours with the checksums that were saved with them.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: not a complete model, or a damaged one.
    NotImplementedError: a format that has to be converted first.
  """
  if name.startswith(_HF_PREFIX):
    return _open_published(name.removeprefix(_HF_PREFIX))
  found = open_converted(name, verify=verify)
  return ModelSource(
    path=found.path,
    family=found.family,
    config=found.config,
    step=found.step,
    tokenizer_dir=found.tokenizer_dir,
    source_dir=found.source_dir,
    load_params=functools.partial(_restore, found),
    save_companions=functools.partial(_copy_companions, found),
  )


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
    return checkpoint.open_checkpoint(path, verify=verify)
  except ValueError as error:
    folder = checkpoint.absolute(path)
    ours = (folder / checkpoint.MANIFEST, folder / checkpoint.STEPS, folder / checkpoint.META)
    kind = None if any(file.exists() for file in ours) else folders.published_kind(folder)
    if kind is None:
      raise
    raise ValueError(kind) from error


def _restore(found: checkpoint.Checkpoint, dtype: Any = None, shardings: Any = None) -> Params:
  arrays = parameter_store.open_parameters(found.params_path)
  check_parameters(families.FAMILIES[found.family], found.config, arrays, str(found.params_path))
  return checkpoint.restore_params(found, dtype=dtype, shardings=shardings)


def _copy_companions(found: checkpoint.Checkpoint, output: epath.Path) -> None:
  folders = {checkpoint.TOKENIZER: found.tokenizer_dir, checkpoint.SOURCE: found.source_dir}
  for name, folder in folders.items():
    for file in sorted(folder.iterdir()) if folder else ():
      (output / name).mkdir(parents=True, exist_ok=True)
      file.copy(output / name / file.name, overwrite=True)


def _open_published(path: str) -> ModelSource:
  if Path(path).exists() and detect_type(Path(path)) == "gguf":
    raise NotImplementedError(f"{path} is a GGUF file, which has to be converted first")
  model = open_model(path)
  folder = epath.Path(path)
  return ModelSource(
    path=folder,
    family=model.family.name,
    config=model.config,
    step=None,
    tokenizer_dir=folder if model.tokenizer_files else None,
    source_dir=folder,
    load_params=functools.partial(load_published, model),
    save_companions=model.save_companions,
  )


def load_published(model: HfModel, dtype: Any = None, shardings: Params | None = None) -> Params:
  """Reads a published model's parameters straight from its files.

  Args:
    model: what `open_model` returned.
    dtype: to cast to while reading; as published by default.
    shardings: like the parameters, a `Sharding` in each place; the first device by default.

  Returns:
    Haiku parameters.

  Raises:
    ValueError: a value does not fit the dtype.
  """
  dtypes = model.parameter_dtypes(None if dtype is None else np.dtype(dtype))
  names: dict[str, list[str]] = {}
  for name, spec in model.specs.items():  # layers come in order
    names.setdefault(spec.ours, []).append(name)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  params: Params = {}
  for path, shape in parameter_shapes(model.family.rules, model.config).items():
    module, _, leaf = path.rpartition("/")
    sharding = device if shardings is None else shardings[module][leaf]
    # Devices that hold the same shard share one reading of it.
    read = functools.cache(functools.partial(_read_shard, model, names[path], dtypes[path], shape))
    params.setdefault(module, {})[leaf] = jax.make_array_from_callback(shape, sharding, read)
  return params


def _read_shard(
  model: HfModel,
  names: list[str],
  dtype: np.dtype,
  shape: tuple[int, ...],
  index: tuple[slice, ...],
) -> np.ndarray:
  """Reads one device's part of a parameter."""
  index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
  spec = model.specs[names[0]]
  if spec.layer is None:
    return read_part(model.tensors[names[0]], index, transpose=spec.transpose, dtype=dtype)
  shard = np.empty([part.stop - part.start for part in index], dtype)
  for layer, values in zip(names[index[0]], shard, strict=True):
    values[...] = read_part(model.tensors[layer], index[1:], transpose=spec.transpose, dtype=dtype)
  return shard
