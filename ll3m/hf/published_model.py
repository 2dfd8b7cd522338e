"""Published models whose weights are still on disk, and their conversion to LL3M parameters."""

import dataclasses
import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from ll3m import families
from ll3m.core import checkpoint
from ll3m.core.checkpoint_items import Params
from ll3m.core.model_config import ModelConfig
from ll3m.families.tensor_rules import TensorSpec, parameter_shapes
from ll3m.hf.lazy_tensor import Index, LazyTensor, read_part
from ll3m.hf.token_settings import settle_tokenizer


@dataclasses.dataclass(frozen=True)
class HfModel:
  """A published model whose weights are still on disk.

  Attributes:
    path: The folder, or the GGUF file.
    checkpoint_type: The type of the weights, one of `model_files.CHECKPOINT_TYPES`.
    family: The name of the family.
    config: The architecture.
    specs: The specification of each tensor, by its name in the checkpoint.
    tensors: Exactly the tensors that the architecture needs.
    ignored: The names of tensors that are not needed.
    config_files: The contents of config.json and generation_config.json, if present.
    tokenizer_files: Functions that return the contents of the tokenizer's files, by file name.
    step: None, as for every model that is not a step of a training run.
  """

  path: Path
  checkpoint_type: str
  family: str
  config: ModelConfig
  specs: dict[str, TensorSpec]
  tensors: dict[str, LazyTensor]
  ignored: tuple[str, ...]
  config_files: dict[str, bytes]
  tokenizer_files: dict[str, Callable[[], bytes]]
  step: None = None

  @functools.cached_property
  def _companions(self) -> tuple[epath.Path, epath.Path]:
    """The folders of the tokenizer and of the config files."""
    if self.checkpoint_type != "gguf":
      return epath.Path(self.path), epath.Path(self.path)
    folder = epath.Path(tempfile.mkdtemp(prefix="ll3m-"))  # GGUF stores them in its metadata
    weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
    self.save_companions(folder)
    return folder / checkpoint.TOKENIZER, folder / checkpoint.SOURCE

  @property
  def tokenizer_dir(self) -> epath.Path | None:
    """The folder of the tokenizer's files, if any; it exists as long as this object."""
    return self._companions[0] if self.tokenizer_files else None

  @property
  def source_dir(self) -> epath.Path:
    """The folder of the config files; it exists as long as this object."""
    return self._companions[1]

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shapes of the LL3M parameters, by "module/name"."""
    return parameter_shapes(families.FAMILIES[self.family].rules, self.config)

  def load_params(self, *, dtype: Any = None, shardings: Params | None = None) -> Params:
    """Reads the parameters directly from the published files; each device reads its own shards.

    Args:
      dtype: The dtype to cast to while reading; None keeps the published one.
      shardings: The shardings, in the parameters' structure; None selects the first device.

    Returns:
      Haiku parameters.

    Raises:
      ValueError: A value does not fit the dtype.
    """
    dtypes = self.parameter_dtypes(None if dtype is None else np.dtype(dtype))
    names: dict[str, list[str]] = {}
    for name, spec in self.specs.items():  # layers are in order
      names.setdefault(spec.ours, []).append(name)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: Params = {}
    for path, shape in self.shapes.items():
      module, _, leaf = path.rpartition("/")
      sharding = device if shardings is None else shardings[module][leaf]
      # A shard that several devices hold is read once.
      read = functools.cache(functools.partial(self._read_shard, names[path], dtypes[path], shape))
      params.setdefault(module, {})[leaf] = jax.make_array_from_callback(shape, sharding, read)
    return params

  def _read_shard(
    self, names: list[str], dtype: np.dtype, shape: tuple[int, ...], index: Index
  ) -> np.ndarray:
    """Reads one device's part of a parameter."""
    index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    spec = self.specs[names[0]]
    if spec.layer is None:
      return read_part(self.tensors[names[0]], index, transpose=spec.transpose, dtype=dtype)
    shard = np.empty([part.stop - part.start for part in index], dtype)
    for layer, values in zip(names[index[0]], shard, strict=True):
      tensor = self.tensors[layer]
      values[...] = read_part(tensor, index[1:], transpose=spec.transpose, dtype=dtype)
    return shard

  def parameter_dtypes(self, dtype: np.dtype | None = None) -> dict[str, np.dtype]:
    """Returns the dtype of each LL3M parameter: the given one, or that of the files.

    Layers whose dtypes differ get a dtype that represents all of them exactly.
    """
    dtypes: dict[str, np.dtype] = {}
    for name, spec in self.specs.items():
      given = np.dtype(dtype or self.tensors[name].dtype)
      other = dtypes.setdefault(spec.ours, given)
      if given != other:
        # Promote through float32, because NumPy has no common type of bfloat16 and float16.
        dtypes[spec.ours] = np.promote_types(np.promote_types(np.float32, given), other)
    return dtypes

  def save_companions(self, output: epath.Path) -> None:
    """Writes the tokenizer and the config files into `tokenizer/` and `hf/` of a folder.

    If transformers would choose between the tokenizer's files, only its choice is written.
    """
    for folder, files in (
      (checkpoint.SOURCE, {name: lambda c=c: c for name, c in self.config_files.items()}),
      (checkpoint.TOKENIZER, self.tokenizer_files),
    ):
      for name, content in files.items():
        (output / folder).mkdir(parents=True, exist_ok=True)
        (output / folder / name).write_bytes(content())
    if self.tokenizer_files:
      settle_tokenizer(output / checkpoint.TOKENIZER, output / checkpoint.SOURCE)
