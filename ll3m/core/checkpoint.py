"""The layout of checkpoints on disk, and how they are read.

Three kinds of folder hold a model:

* a converted folder (`ll3m.convert`): `params/`, `tokenizer/`, `hf/` (the source's config.json)
  and `ll3m.json`, which is written last and without which the folder is incomplete;
* a step folder of a training run: the Orbax items `params/` and `meta/`, and for resuming
  `optimizer/` and `dataset/`;
* a run's output_dir: `checkpoints/<step>/` beside `tokenizer/` and `hf/`. Opening it opens its
  latest finished step.

A converted folder and a step folder also hold `digests.json`, the checksums of their files.
Paths may be local or remote (gs://); Orbax and etils handle both.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ll3m.core import checkpoint_items, checksums
from ll3m.core.checkpoint_items import Params, flatten, nest
from ll3m.core.model_config import ModelConfig
from ll3m.core.object_store import is_remote

FORMAT = 1
MANIFEST = "ll3m.json"
PARAMS = "params"
OPTIMIZER = "optimizer"
META = "meta"
DATASET = "dataset"
STEPS = "checkpoints"
TOKENIZER = "tokenizer"
SOURCE = "hf"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A complete model on disk, described without reading its arrays.

  Attributes:
    path: The folder that holds `params/`.
    family: The name of the family.
    config: The architecture.
    tokenizer_dir: The folder of the tokenizer's files; None if there are none.
    source_dir: The folder of the config.json and generation_config.json that the model was
      published with; None if there are none.
    step: The number of completed optimizer steps; None if this is not a step of a training run.
    meta: The contents of the manifest.
    check_params: A function that takes descriptions of the parameters by "module/name" and raises
      ValueError if they do not match the config. `load_params` calls it before it reads them.
  """

  path: epath.Path
  family: str
  config: ModelConfig
  tokenizer_dir: epath.Path | None
  source_dir: epath.Path | None
  step: int | None
  meta: Mapping[str, Any]
  check_params: Callable[[Mapping[str, Any]], None] = lambda found: None

  @property
  def params_path(self) -> epath.Path:
    """The Orbax checkpoint of the parameters."""
    return self.path / PARAMS

  @property
  def config_files(self) -> dict[str, bytes]:
    """The contents of the files in `source_dir`, by their names."""
    return _read_files(self.source_dir)

  @property
  def tokenizer_files(self) -> dict[str, bytes]:
    """The contents of the files in `tokenizer_dir`, by their names."""
    return _read_files(self.tokenizer_dir)

  def load_params(self, *, dtype: Any = None, shardings: Params | None = None) -> Params:
    """Reads the parameters; each device receives only its own shards.

    Args:
      dtype: The dtype to cast to while reading; the saved dtype by default.
      shardings: The parameters' shardings, in the same structure; the first device by default.

    Returns:
      Haiku parameters.

    Raises:
      ValueError: The arrays do not match the config, or cannot be read.
    """
    found = flatten(checkpoint_items.describe_arrays(self.params_path))
    self.check_params(
      {f"{m}/{n}": leaf for m, leaves in found.items() for n, leaf in leaves.items()}
    )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
      module: {
        name: jax.ShapeDtypeStruct(
          leaf.shape,
          dtype or leaf.dtype,
          sharding=device if shardings is None else shardings[module][name],
        )
        for name, leaf in leaves.items()
      }
      for module, leaves in found.items()
    }
    return flatten(checkpoint_items.restore_arrays(self.params_path, nest(like)))

  def require_resumable(self) -> None:
    """Checks that the optimizer's state was saved.

    Raises:
      ValueError: Only the parameters were saved.
    """
    if not (self.path / OPTIMIZER).is_dir():
      raise ValueError(
        f"cannot resume from {self.path}: it was saved without the optimizer's state "
        f"(`checkpointer.save_optimizer_state`=False); start a new run with "
        f"`load_checkpoint`=params::{self.path}"
      )

  def restore_state[State: tuple](self, like: State) -> State:
    """Restores the train state of a step, bit for bit.

    Args:
      like: A named tuple that describes the run's state (step, params, opt_state and rng) by
        `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: The step was saved without the optimizer's state or for another model or
        optimizer, or its arrays are damaged.
    """
    self.require_resumable()
    items = {
      PARAMS: ("parameters", nest(like.params)),
      OPTIMIZER: ("optimizer's arrays", name_leaves(like.opt_state)),
    }
    for item, (what, wanted) in items.items():
      if found := checkpoint_items.describe_differences(self.path / item, wanted):
        raise ValueError(
          f"cannot resume from {self.path}: its {what} differ from this run's: {found}"
        )
    params, opt_state = (
      checkpoint_items.restore_arrays(self.path / item, wanted)
      for item, (_, wanted) in items.items()
    )
    return like._replace(
      step=jax.device_put(np.int32(self.step), like.step.sharding),
      params=flatten(params),
      opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), opt_state.values()),
      rng=jax.device_put(np.asarray(self.meta["rng"], np.uint32), like.rng.sharding),
    )

  def dataset_state(self) -> dict[str, bytes]:
    """Reads the position in the data.

    Raises:
      ValueError: The position was not saved.
    """
    if not (self.path / DATASET).is_dir():
      raise ValueError(f"no data position was saved at {self.path}")
    return checkpoint_items.BytesHandler().restore(
      self.path / DATASET, checkpoint_items.BytesRestore()
    )

  def save_companions(self, output: epath.Path) -> None:
    """Writes the tokenizer and the config files into a folder's `tokenizer/` and `hf/`."""
    for name, files in ((TOKENIZER, self.tokenizer_files), (SOURCE, self.config_files)):
      for file, content in files.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        (output / name / file).write_bytes(content)


def open_checkpoint(path: epath.PathLike, *, verify: bool = True) -> Checkpoint:
  """Opens the model in a converted folder, a run's output_dir or one step folder.

  Args:
    path: The folder. For a run, the latest good step is opened, and skipped steps are logged.
    verify: Whether to compare all files with their checksums.

  Raises:
    FileNotFoundError: The folder does not exist.
    ValueError: The folder holds no complete model, or a damaged one.
  """
  path = absolute(path)
  # If access is denied, TensorFlow's is_dir returns False; exists raises an error.
  if not (path.exists() and path.is_dir()):
    raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
  if (path / MANIFEST).exists() or not (path / STEPS).is_dir():
    return _open(path, verify)
  return list_steps(path).open_latest(verify=verify)


class Steps(NamedTuple):
  """The steps of a run at the time its folder was listed.

  Attributes:
    folder: The folder that holds the steps.
    finished: The completely saved steps, in ascending order.
    unfinished: The steps whose save has not finished; in an object store, a step has its final name
      from the start.
  """

  folder: epath.Path
  finished: list[int]
  unfinished: list[int]

  def open_latest(self, *, verify: bool = True) -> Checkpoint:
    """Opens the latest good step and logs the steps that it skips.

    Raises:
      ValueError: No step is good.
    """
    run, reasons = self.folder.parent, []
    for step in reversed(self.finished):
      try:
        return _open(self.folder / str(step), verify)
      except ValueError as error:
        logging.warning("skipping step %d of %s: %s", step, run, error)
        reasons.append(str(error))
    latest = f"; latest step: {reasons[0]}" if reasons else ""
    raise ValueError(f"not a complete checkpoint: {run} holds no good step{latest}")


def list_steps(output_dir: epath.PathLike) -> Steps:
  """Lists the steps of a run.

  Raises:
    ValueError: A folder that is named like a step holds a converted model.
  """
  found = Steps(absolute(output_dir) / STEPS, [], [])
  if found.folder.is_dir():
    names = [path.name for path in found.folder.iterdir()]
    for step in sorted(int(n) for n in names if n.isdecimal() and n == str(int(n))):
      path = found.folder / str(step)
      if (path / MANIFEST).exists():  # a run would count it as a step of its own, and delete it
        raise ValueError(f"{path} is a converted model, but is named like a step; rename it")
      finished = ocp.utils.is_checkpoint_finalized(path)
      (found.finished if finished else found.unfinished).append(step)
  return found


def finished_steps(output_dir: epath.PathLike) -> list[int]:
  """Returns the completely saved steps of a run, in ascending order; see `list_steps`."""
  return list_steps(output_dir).finished


def _open(path: epath.Path, verify: bool) -> Checkpoint:
  """Opens a converted folder or one step folder."""
  home, manifest = path, path / MANIFEST
  if not manifest.exists():
    home, manifest = _run_of(path), path / META / "metadata"
  if not manifest.exists():
    raise ValueError(
      f"not a complete checkpoint: {path} has no {MANIFEST} (a converted folder), "
      f"{META}/metadata (a step) or {STEPS}/ (a run)"
    )
  meta = _read_json(manifest)
  if meta.get("format") != FORMAT:
    raise ValueError(
      f"not a complete checkpoint: {path} has format {meta.get('format')!r}, expected {FORMAT}"
    )
  if lacking := {"family", "config"} - meta.keys():
    raise ValueError(f"not a complete checkpoint: {manifest} lacks {', '.join(sorted(lacking))}")
  if not (path / PARAMS).is_dir():
    raise ValueError(f"not a complete checkpoint: {path} has no {PARAMS}/")
  if verify:
    checksums.check(path)
  return Checkpoint(
    path=path,
    family=meta["family"],
    config=ModelConfig.from_dict(meta["config"]),
    tokenizer_dir=home / TOKENIZER if home and (home / TOKENIZER).is_dir() else None,
    source_dir=home / SOURCE if home and (home / SOURCE).is_dir() else None,
    step=meta.get("step"),
    meta=meta,
  )


def _run_of(step: epath.Path) -> epath.Path | None:
  """Returns the output_dir of a step folder's run; None for a copy elsewhere."""
  # A link (latest -> checkpoints/40) or a relative path (../40) names another parent folder.
  steps = (step if is_remote(step) else epath.Path(os.path.realpath(step))).parent
  return steps.parent if steps.name == STEPS else None


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns the absolute path that Orbax requires; a remote path is returned unchanged."""
  path = epath.Path(path)
  return path if is_remote(path) else path.expanduser().absolute()


def name_leaves(tree: Any) -> dict[str, Any]:
  """Names the optimizer's arrays by their tree paths, which a restore compares and reports."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {f"{i:03d}{jax.tree_util.keystr(path)}": leaf for i, (path, leaf) in enumerate(leaves)}


def model_meta(family: str, config: ModelConfig) -> dict[str, Any]:
  """Returns the manifest entries that every folder with a model has."""
  return {"format": FORMAT, "family": family, "config": config.to_dict()}


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"not a complete checkpoint: cannot read {path}: {error}") from error
  if not isinstance(found, dict):
    raise ValueError(f"not a complete checkpoint: {path} holds no JSON object")
  return found


def _read_files(folder: epath.Path | None) -> dict[str, bytes]:
  files = sorted(folder.iterdir()) if folder else ()
  return {file.name: file.read_bytes() for file in files if not file.is_dir()}
