"""`ll3m.load` and `ll3m.init`: models loaded from files, or initialised with random parameters."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ll3m import families
from ll3m.api.model import Model
from ll3m.core import sharding
from ll3m.core.dtypes import DTYPES
from ll3m.core.model_config import ModelConfig
from ll3m.data.config import TokenizerConfig
from ll3m.data.tokenizer import load_tokenizer
from ll3m.hf.model_source import open_source
from ll3m.models import transformer


def load(
  path: str | os.PathLike[str],
  *,
  dtype: Any = "float32",
  param_dtype: Any = "float32",
  tokenizer: str | os.PathLike[str] | None = None,
  mesh: str | Mesh | None = None,
  remat: str = "nothing",
  verify: bool = True,
) -> Model:
  """Loads a model.

  Args:
    path: A folder written by `Model.save` or ll3m.convert, a run's output_dir (selects its latest
      step), a step folder of a run, a Hugging Face folder, or a GGUF file of the Llama
      architecture. A Hugging Face folder may also be given as `hf::PATH`.
    dtype: The dtype of activations: "float32" or "bfloat16".
    param_dtype: The dtype of parameters; None keeps that of the files.
    tokenizer: A SentencePiece file or tokenizer folder that replaces the model's own tokenizer.
    mesh: The devices over which parameters and batches are sharded: a mesh of `ll3m.make_mesh`, or
      its sizes as "dp,fsdp,mp". None for the first device.
    remat: What the backward pass recomputes instead of storing it; see `Model`.
    verify: Whether to compare the files of LL3M checkpoints with their checksums.

  Raises:
    FileNotFoundError: The path does not exist.
    ValueError: The model is incomplete or damaged.
    NotImplementedError: The format or the architecture is not supported.
  """
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  source = open_source(os.fspath(path), verify=verify)
  params = source.load_params(
    dtype=None if param_dtype is None else _parse_dtype("param_dtype", param_dtype),
    shardings=_shardings(source.config, mesh=mesh),
  )
  own = None
  if tokenizer is not None or source.tokenizer_dir is not None:
    own = load_tokenizer(
      TokenizerConfig(path=None if tokenizer is None else os.fspath(tokenizer)),
      checkpoint_dir=source.tokenizer_dir,
      source_dir=source.source_dir,
      embedding_size=source.config.vocab_size,
    )
  return Model(
    config=source.config,
    params=params,
    tokenizer=own,
    family=source.family,
    dtype=_parse_dtype("dtype", dtype),
    remat=remat,
    mesh=mesh,
    source_files=source.config_files,
  )


def init(
  config: str | ModelConfig,
  *,
  seed: int = 0,
  tokenizer: str | os.PathLike[str] | None = None,
  family: str | None = None,
  dtype: Any = "float32",
  param_dtype: Any = "float32",
  mesh: str | Mesh | None = None,
  remat: str = "nothing",
  **changes: Any,
) -> Model:
  """Creates a model with random parameters.

  Args:
    config: The name of a published model ("llama2_7b"), or an architecture.
    seed: The random seed.
    tokenizer: A SentencePiece file or tokenizer folder.
    family: The family; required if `config` is a `ModelConfig`.
    dtype: The dtype of activations; see `load`.
    param_dtype: The dtype of parameters.
    mesh: The devices; see `load`.
    remat: What the backward pass recomputes; see `Model`.
    **changes: Fields of the architecture to replace, such as `num_layers=2`.

  Raises:
    ValueError: A name is unknown, or a field is invalid.
  """
  if isinstance(config, str):
    preset = families.get_preset(config)
    family, config = preset.family.name, preset.config
  if family not in families.FAMILIES:
    raise ValueError(f"family must be one of {', '.join(families.FAMILIES)}, got {family!r}")
  config = config.replace(**changes)
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  wide = _parse_dtype("param_dtype", param_dtype)
  model = Model(
    config=config,
    params={},
    tokenizer=None,
    family=family,
    dtype=_parse_dtype("dtype", dtype),
    remat=remat,
    mesh=mesh,
  )

  def make(key):
    return jax.tree.map(lambda x: x.astype(wide), model.decoder.init(key))

  params = jax.jit(make, out_shardings=_shardings(config, mesh=mesh))(jax.random.key(seed))
  if tokenizer is not None:
    model = model.replace(
      tokenizer=load_tokenizer(
        TokenizerConfig(path=os.fspath(tokenizer)), embedding_size=config.vocab_size
      )
    )
  return model.replace(params=params)


def _parse_dtype(name: str, dtype: Any) -> Any:
  """Returns the JAX dtype given by name ("float32", "bf16") or as a type.

  Raises:
    ValueError: The dtype is not float32, bfloat16 or float16.
  """
  try:
    found = jnp.dtype(DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
  except TypeError:
    found = None
  if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise ValueError(f"{name} must be float32, bfloat16 or float16, got {dtype!r}")
  return found


def _shardings(config: ModelConfig, *, mesh: Mesh | None) -> Any:
  if mesh is None:
    return None
  shapes = jax.eval_shape(transformer.make_model(config).init, jax.random.key(0))
  return sharding.parameter_shardings(shapes, mesh)
