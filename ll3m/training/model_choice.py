"""Choice of the model to train or evaluate: its options, checked against the checkpoint."""

import dataclasses
from collections.abc import Collection
from typing import Any

from jax.sharding import Mesh

from ll3m import families
from ll3m.core import options
from ll3m.core.dtypes import COMPUTED, DTYPES
from ll3m.core.model_config import ModelConfig, apply_updates
from ll3m.core.options import naming
from ll3m.models.kernels import Kernels
from ll3m.models.transformer import REMAT_POLICIES, Model, make_model


@dataclasses.dataclass(frozen=True)
class ModelOptions(options.VerifyConfig):
  """Options of the model that training and evaluation share."""

  load_model_config: str | None = options.option(
    None,
    "Model architecture: a preset (llama2_7b, mistral_7b, gemma_2b, phi_2, ...) or the path of a "
    "config.json. By default, the checkpoint's own.",
  )
  update_model_config: str = options.option(
    "", "Fields of the model architecture to change: key=value,key=value."
  )
  dtype: str = options.option("f32", "Dtype of the activations.", choices=COMPUTED)
  mesh_dim: str = options.option(
    "-1,1,1",
    "Sizes of the mesh axes dp,fsdp,mp, by order (1,-1,4) or by name (dp:1,fsdp:-1,mp:4). One may "
    "be -1 for all remaining devices.",
  )


@dataclasses.dataclass(frozen=True)
class TrainModelOptions(ModelOptions):
  """Options of the model that only training has."""

  param_dtype: str = options.option(
    "f32", "Dtype of the parameters and of the optimizer's moments.", choices=COMPUTED
  )
  remat: str = options.option(
    "nothing",
    "Activations that the backward pass recomputes instead of storing: nothing, all but matrix "
    "products (dots), all but the outputs of attention (attention), or all (full).",
    choices=tuple(REMAT_POLICIES),
  )


def choose_model(options: ModelOptions, source: Any = None) -> families.Preset:
  """Returns the architecture given by the options and the checkpoint, which must agree.

  Args:
    options: Options of the model.
    source: Source of the parameters, with `family` and `config`; None for random parameters.

  Raises:
    ValueError: A preset or field is unknown, no model is given, or the checkpoint holds a different
      model.
  """
  if options.load_model_config:
    with naming("load_model_config"):
      preset = families.load(options.load_model_config)
  elif source is not None:
    preset = families.Preset(families.FAMILIES[source.family], source.config)
  else:
    raise ValueError("`load_model_config` must be given when no checkpoint is loaded")
  with naming("update_model_config"):
    config = apply_updates(preset.config, options.update_model_config)
  if source is not None:
    # Fields in `_FREE` may differ from the checkpoint's if the options name them explicitly.
    kept = {name: getattr(source.config, name) for name in _FREE}
    named = apply_updates(source.config.replace(**kept), options.update_model_config)
    asked = {n for n in _FREE if getattr(named, n) != getattr(source.config, n)}
    if preset.family.name != source.family:
      raise ValueError(
        f"the checkpoint holds a {source.family} model, but the run is for {preset.family.name}"
      )
    check_same_model(config, source.config, may_differ=asked)
  return families.Preset(preset.family, config)


# Fields that may differ for the same set of weights.
_FREE = (
  "max_positions", "sliding_window", "norm_epsilon", "rope_theta", "rope_local_theta",
  "rope_scaling", "rope_scaling_factor", "rope_original_positions", "rope_frequency_factors",
  "rope_short_factors", "rope_long_factors", "rope_magnitude",
)  # fmt: skip


def check_same_model(
  config: ModelConfig, saved: ModelConfig, *, may_differ: Collection[str] = ()
) -> None:
  """Checks that a checkpoint has the run's model config.

  Args:
    config: Config of the run.
    saved: Config of the checkpoint.
    may_differ: Fields that are not compared.

  Raises:
    ValueError: Some fields differ; the message lists them.
  """
  wanted, found = config.to_dict(), saved.to_dict()
  different = [
    f"{name} is {found[name]!r} in the checkpoint and {wanted[name]!r} in the run"
    for name in wanted
    if wanted[name] != found[name] and name not in may_differ
  ]
  if different:
    raise ValueError("the checkpoint holds a different model: " + "; ".join(different))


def check_length(length: int, config: ModelConfig) -> None:
  """Checks that rows are no longer than the model's context.

  Raises:
    ValueError: The rows are longer.
  """
  if length > config.max_positions:
    raise ValueError(
      f"`task_feature_lengths`: rows of {length} tokens are longer than the model's "
      f"{config.max_positions} positions "
      f"(`update_model_config`=max_positions={length} allows it)"
    )


def build_model(config: ModelConfig, mesh: Mesh, *, dtype: str, remat: str = "nothing") -> Model:
  """Builds the decoder for a mesh: activations are sharded by rows, attention also by heads."""
  return make_model(config, dtype=DTYPES[dtype], remat=remat, kernels=Kernels.on(mesh))
